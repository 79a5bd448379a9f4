"""Refinement: texts are cut and continued in several ways, and the best of old and new goes on.

    stage 0: n_0 whole texts from p; y = arg max r
    stage j: cut at t_j; K whole continuations of y[:t_j] from p; y = arg max r over y and the new

This is Transfer Q* by blocks with one roll-out each, in which the roll-out that was scored stays a
candidate: without that it loses to the best of n, with it no stage can lower the reward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ..config import DecodeConfig, Strategy, require_int
from ..errors import InvalidArgument
from ..results import PromptResult, StageTrace
from ..session import Session
from .call import OpenMethod, PresetCall
from .contests import ContestMethod, Contests, check_strategy
from .rounds import Round
from .served import Law
from .sources import Source, TextSource, ValueLike

Cuts: TypeAlias = Literal["even", "sentence"] | int | Sequence[int]

# The end of a sentence, perhaps within quotes or brackets, or of a line.
_SENTENCE_END = re.compile(r"([.!?\u2026\u3002][\"'\u201d\u2019)\]]*|\n)\s*\Z")


def open_refine(
    name: str,
    models: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    source: Source,
    value: ValueLike | None,
    first: int,
    branches: int,
    stages: int,
    cuts: Cuts,
    strategy: Strategy,
) -> OpenMethod:
    """Open the refinement of `first` texts from `source` in `stages` stages."""
    require_int("first", first)
    require_int("branches", branches)
    require_int("stages", stages, low=0)
    check_strategy(strategy)
    chosen = TextSource(name, source, value)
    plan = CutPlan(cuts, stages)
    call = PresetCall(name, options, chosen.models_of(models, options))
    chosen.require(call)
    call.require("reward")

    def make(session: Session, config: DecodeConfig) -> RefineMethod:
        plan.require(session)
        law = chosen.law(session, config, is_greedy=False, measures_sft=False)
        return RefineMethod(
            session,
            law,
            config,
            first=first,
            branches=branches,
            plan=plan,
            is_soft=strategy == "sample",
        )

    return call.open(make)


class CutPlan:
    """Where texts are cut, stage by stage.

    Args:
        cuts: "even", at j / (stages + 1) of the text; "sentence", behind its j-th sentence; an
            integer, at j times so many tokens; integers, at these tokens, one a stage.
        stages: number of stages.

    Raises:
        InvalidArgument: no such cuts.
    """

    def __init__(self, cuts: Cuts, stages: int) -> None:
        is_list = isinstance(cuts, (list, tuple)) and all(_is_count(cut) for cut in cuts)
        if not (cuts in ("even", "sentence") if isinstance(cuts, str) else _is_count(cuts)):
            if not is_list:
                raise InvalidArgument(
                    "cuts must be 'even', 'sentence', a number of tokens, or a list of numbers of "
                    f"tokens, got {cuts!r}"
                )
            assert not isinstance(cuts, (str, int))
            if len(cuts) != stages:
                raise InvalidArgument(
                    f"cuts must be one number a stage, {stages}, got {len(cuts)}: {cuts!r}"
                )
        self.cuts = cuts
        self.stages = stages

    @property
    def is_approximate(self) -> bool:
        """Whether cuts depend on more than the text before them: even ones do on its length."""
        return self.cuts == "even" and self.stages > 0

    def require(self, session: Session) -> None:
        """Refuse cuts at sentences without text."""
        if self.cuts == "sentence" and session.tokenizer is None:
            raise InvalidArgument(
                "cuts='sentence' are looked for in text, but the models came without a tokenizer; "
                "pass tokenizer="
            )

    def earliest(self, stage: int) -> int:
        """Return where a text is cut at `stage` (from 1), at the earliest."""
        if isinstance(self.cuts, int):
            return stage * self.cuts
        return 0 if isinstance(self.cuts, str) else self.cuts[stage - 1]

    def at(self, stage: int, token_ids: Sequence[int], session: Session) -> int | None:
        """Return where a text is cut at `stage` (from 1); None where it ends before that."""
        if self.cuts == "even":
            cut = stage * len(token_ids) // (self.stages + 1)
        elif self.cuts == "sentence":
            found = _sentence_end(token_ids, stage, session)
            if found is None:
                return None
            cut = found
        elif isinstance(self.cuts, int):
            cut = stage * self.cuts
        else:
            assert not isinstance(self.cuts, str)
            cut = self.cuts[stage - 1]
        return cut if cut < len(token_ids) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _sentence_end(token_ids: Sequence[int], number: int, session: Session) -> int | None:
    """Return how many tokens the first `number` sentences take; None where there are fewer.

    Whether a token ends a sentence follows from the text up to it, so that the bound on the
    divergence holds.
    """
    assert session.tokenizer is not None
    was_end, count = True, 0
    for length in range(1, len(token_ids) + 1):
        text = str(session.tokenizer.decode(token_ids[:length], skip_special_tokens=True))
        is_end = _SENTENCE_END.search(text) is not None
        count += is_end and not was_end
        if count == number:
            return length
        was_end = is_end
    return None


class RefineMethod(ContestMethod):
    """Refinement as a session runs it.

    Args:
        session: models, and the reward that judges.
        law: what texts are drawn from.
        config: how they are drawn; alpha weighs a soft choice.
        first: whole texts of stage 0.
        branches: continuations of each later stage.
        plan: where texts are cut.
        is_soft: whether a stage's text is drawn from softmax(reward / alpha) over old and new.
    """

    def __init__(
        self,
        session: Session,
        law: Law,
        config: DecodeConfig,
        *,
        first: int,
        branches: int,
        plan: CutPlan,
        is_soft: bool,
    ) -> None:
        most = config.max_new_tokens
        cuts = [plan.earliest(stage) for stage in range(1, plan.stages + 1)]
        later = [Round(branches, most - cut, cut) for cut in cuts if cut < most]
        rounds = [Round(first, most), *later]
        super().__init__(session, law, config, rounds=rounds, is_soft=is_soft)
        self.first = first
        self.branches = branches
        self.plan = plan

    def search(self, contests: Contests) -> list[PromptResult]:
        """Draw, then cut and continue, stage by stage."""
        trees = range(len(contests.texts))
        contests.hold(0, dict.fromkeys(trees, 0), self.first, defends=False)
        for stage in range(1, self.plan.stages + 1):
            found = {
                tree: self.plan.at(stage, contests.texts[tree].token_ids, self.session)
                for tree in trees
            }
            cuts = {tree: cut for tree, cut in found.items() if cut is not None}
            if cuts:
                contests.hold(stage, cuts, self.branches, defends=True)
        added = [self._choice_kl(text.stages) for text in contests.texts]
        return contests.results(
            added if self.first > 1 or self.plan.stages else None,
            is_approximate=self.plan.is_approximate,
        )

    def _choice_kl(self, stages: Sequence[StageTrace]) -> float:
        """Return the bound on the divergence that the choices of all stages add, nats.

        With h the binary entropy and p_j the probability that the old text stays, it is

            log n_0 - (n_0 - 1) / n_0 + sum_j [h(p_j) + (1 - p_j)(log K - (K - 1) / K)]

        for cuts that follow from the text before them. A single response does not know p_j. In the
        place of h(p_j) stands the length of a code for what happened (Krichevsky and Trofimov's, of
        the stages before), whose mean over responses is never less than the entropy.
        """
        first, *others = stages
        total, stayed = self.choice_kl(first), 0
        for number, stage in enumerate(others):
            chance = (stayed + 0.5) / (number + 1)
            if stage.choice is None:
                total -= math.log(chance)
                stayed += 1
            else:
                total -= math.log(1 - chance)
                total += self.choice_kl(stage)
        return total
