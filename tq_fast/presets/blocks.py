"""Blocks: several blocks of tokens are drawn, the reward chooses one, and the text goes on from it.

The reward judges the text so far, as ARGS does by token (arXiv 2402.01694), or whole texts: then
every block is completed first, and only the block of the winner stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from ..config import DecodeConfig, Strategy
from ..errors import InvalidArgument
from ..prompts import Prompt
from ..results import DecodeResult, DecodeStats, Response
from ..session import Report, Session
from ..transfer.budget import BatchShape, MemoryPerPrompt
from .call import OpenMethod, PresetCall
from .contests import Contests, choice_kl
from .laws import TokenLaw
from .plain import require_count, text_memory
from .refining import check_strategy
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
    require_count("branches", branches)
    require_count("block_len", block_len)
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


class BlocksMethod:
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
        law: TokenLaw,
        config: DecodeConfig,
        *,
        branches: int,
        block_len: int,
        completes: bool,
        is_soft: bool,
    ) -> None:
        self.session = session
        self.law = law
        self.config = config
        session.stop_strings(config)
        self.branches = branches
        self.block_len = block_len
        self.completes = completes
        self.is_soft = is_soft
        self.rows_per_prompt = branches
        most = config.max_new_tokens
        starts = range(0, most, block_len)
        drawn = [most - start if completes else min(block_len, most - start) for start in starts]
        self.tokens_per_prompt = branches * sum(drawn)
        self.num_new = most
        self.room = f"max_new_tokens={most}"

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a block, for the longest of `prompts`."""
        rows = self.rows_per_prompt
        return text_memory(
            self.session, self.law, prompts, self.config, rows=rows, keeps_texts=True
        )

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> None:
        """Decode the first prompts together, a block of each a round."""
        group = responses[: shape.num_prompts]
        own, counted = DecodeStats(), report.bar.num_done
        try:
            contests = Contests(
                self.session,
                self.law,
                group,
                per_wave=max(1, min(self.branches, shape.max_rows // len(group))),
                config=self.config,
                is_soft=self.is_soft,
                report=report,
                stats=own,
            )
            open_trees = list(range(len(group)))
            for stage in itertools.count():
                if not open_trees:
                    break
                contests.hold(
                    stage,
                    {tree: len(contests.texts[tree].token_ids) for tree in open_trees},
                    self.branches,
                    limit=None if self.completes else self.block_len,
                    kept=self.block_len,
                    defends=False,
                )
                open_trees = [tree for tree in open_trees if not contests.is_complete(tree)]
            alpha, is_soft = self.config.alpha, self.is_soft
            added = [
                sum(choice_kl(stage, alpha, is_soft=is_soft) for stage in text.stages)
                for text in contests.texts
            ]
            results = contests.results(added if self.branches > 1 else None)
        except torch.OutOfMemoryError:
            report.bar.advance(counted - report.bar.num_done)
            raise
        stats.add(own)
        # Texts that ended early left the rest of their tokens undrawn.
        rest = counted + len(group) * self.tokens_per_prompt - report.bar.num_done
        for response, result in zip(group, results, strict=True):
            stats.num_steps += len(result.sequence)
            report.finish(response.idx, result, num_unused=rest)
            rest = 0

    def conclude(self, result: DecodeResult) -> None:
        """Nothing is estimated, so that there is nothing to warn of."""
