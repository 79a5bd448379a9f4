"""Blocks: several blocks of tokens are drawn, the reward chooses one, and the text goes on from it.

The reward judges the text so far, as ARGS does by token (arXiv 2402.01694), or whole texts: then
every block is completed first, and only the block of the winner stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from ..config import DecodeConfig, Strategy, require_int
from ..errors import InvalidArgument
from ..results import PromptResult
from ..session import Session
from .call import OpenMethod, PresetCall
from .contests import ContestMethod, Contests, check_strategy
from .rounds import Round
from .served import Law
from .sources import Source, TextSource, ValueLike

Judge: TypeAlias = Literal["prefix", "rollout"]


def open_blocks(
    name: str,
    models: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    source: Source,
    value: ValueLike | None,
    branches: int,
    block_len: int,
    judge: Judge,
    strategy: Strategy,
) -> OpenMethod:
    """Open the choice between `branches` blocks of `block_len` tokens from `source`."""
    require_int("branches", branches)
    require_int("block_len", block_len)
    check_strategy(strategy)
    if judge not in ("prefix", "rollout"):
        raise InvalidArgument(f"judge must be one of 'prefix', 'rollout', got {judge!r}")
    chosen = TextSource(name, source, value)
    call = PresetCall(name, options, chosen.models_of(models, options))
    chosen.require(call)
    call.require("reward")

    def make(session: Session, config: DecodeConfig) -> BlocksMethod:
        law = chosen.law(session, config, is_greedy=False, measures_sft=False)
        return BlocksMethod(
            session,
            law,
            config,
            branches=branches,
            block_len=block_len,
            completes=judge == "rollout",
            is_soft=strategy == "sample",
        )

    return call.open(make)


class BlocksMethod(ContestMethod):
    """Decoding by blocks as a session runs it.

    Args:
        session: models, and the reward that judges.
        law: what blocks are drawn from.
        config: how they are drawn; alpha weighs a soft choice.
        branches: blocks of each round.
        block_len: tokens of a block.
        completes: whether blocks are completed before they are judged.
        is_soft: whether a block is drawn from softmax(reward / alpha), or is the best one.
    """

    def __init__(
        self,
        session: Session,
        law: Law,
        config: DecodeConfig,
        *,
        branches: int,
        block_len: int,
        completes: bool,
        is_soft: bool,
    ) -> None:
        most = config.max_new_tokens
        rounds = [
            Round(branches, most - start if completes else min(block_len, most - start), start)
            for start in range(0, most, block_len)
        ]
        super().__init__(session, law, config, rounds=rounds, is_soft=is_soft)
        self.branches = branches
        self.block_len = block_len
        self.completes = completes

    def search(self, contests: Contests) -> list[PromptResult]:
        """Draw a block of every text that goes on, round by round."""
        trees = list(range(len(contests.texts)))
        for stage in itertools.count():
            if not trees:
                break
            contests.hold(
                stage,
                {tree: len(contests.texts[tree].token_ids) for tree in trees},
                self.branches,
                limit=None if self.completes else self.block_len,
                kept=self.block_len,
                defends=False,
            )
            trees = [tree for tree in trees if not contests.is_complete(tree)]
        added = [sum(map(self.choice_kl, text.stages)) for text in contests.texts]
        return contests.results(added if self.branches > 1 else None)
