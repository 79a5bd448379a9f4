"""Contests between continuations: of several texts with a common start, the reward chooses one.

The winner of a contest stays in the forest and may be continued, from its end or from a cut in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..config import DecodeConfig
from ..errors import InvalidArgument
from ..ops.philox import gumbel
from ..prompts import Prompt
from ..results import DecodeResult, DecodeStats, PromptResult, Response, StageTrace
from ..rollouts.streams import stream_keys
from ..session import Session
from ..session.method import Report
from ..streaming import ChosenToken, settled_tokens
from ..transfer.budget import BatchShape, MemoryPerPrompt
from .drawing import Drawn
from .plain import best_of_kl, certify_text, text_memory, trace_tokens
from .rounds import Round
from .scoring import TextScorer, check_scoring, score_others
from .served import Law, open_texts

# Takes the place of the candidate in the key of a choice between texts; no token has this id, nor
# has a draw (drawing.py).
_CHOICE = 0xFFFFFFFE


@dataclasses.dataclass
class Text:
    """The text that a tree holds.

    Attributes:
        token_ids: its tokens.
        columns: what its law recorded of them, `[T]` by name.
        reward: of the text as it was judged.
        stages: the contests so far.
        rewards: of every text that was scored so far, by its tokens. A text that comes again has
            the same reward to the last bit, and so is no better than itself.
    """

    token_ids: list[int]
    columns: dict[str, torch.Tensor]
    reward: float = math.nan
    stages: list[StageTrace] = dataclasses.field(default_factory=list)
    rewards: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)


class Contests:
    """The texts of a group of prompts, which contests make longer or better.

    Args:
        session: models, and the reward that judges.
        law: what texts are drawn from.
        responses: the prompts.
        per_wave: continuations of a prompt that are drawn together, at most.
        config: alpha, max_new_tokens, min_new_tokens, stop, seed and backend are read.
        is_soft: whether winners are drawn from softmax(reward / alpha); else they have the highest
            reward, the first one of several.
        report: progress.
        stats: where counts and times are added.
    """

    def __init__(
        self,
        session: Session,
        law: Law,
        responses: Sequence[Response],
        *,
        per_wave: int,
        config: DecodeConfig,
        is_soft: bool,
        report: Report,
        stats: DecodeStats,
    ) -> None:
        self.session = session
        self.law = law
        self.responses = responses
        self.per_wave = per_wave
        self.config = config
        self.is_soft = is_soft
        self.report = report
        self.stats = stats
        empty = dict.fromkeys(law.columns, torch.empty(0))
        self.texts = [Text([], dict(empty)) for _ in responses]
        num_rows = len(responses) * per_wave
        self.forest = open_texts(
            session, law, responses, num_rows=num_rows, config=config, keeps_texts=True
        )
        self.scorer = TextScorer(session, responses, num_rows=num_rows, config=config)
        with stats.phase("prefill"):
            self.forest.prefill()

    def hold(
        self,
        stage: int,
        cuts: Mapping[int, int],
        num: int,
        *,
        limit: int | None = None,
        kept: int | None = None,
        defends: bool,
    ) -> None:
        """Draw `num` continuations of the texts of some trees and let the reward choose.

        Args:
            stage: number of the contest, from 0; each has random streams of its own.
            cuts: where the text of each tree is cut, in response tokens.
            num: continuations a tree.
            limit: tokens of a continuation, at most; None: up to the end of the response.
            kept: tokens of the winner that stay, at most; None: all.
            defends: whether the text that was there is a candidate too.
        """
        before = {tree: self.texts[tree].token_ids[:cut] for tree, cut in cuts.items()}
        with self.stats.phase("prefill"):
            # A tree without a contest stands at its prompt already.
            moved = {tree: text for tree, text in before.items() if self.texts[tree].stages}
            if moved:
                self.forest.seek(moved)
        noise = {tree: self._noise(tree, stage, num) for tree in cuts}
        best: dict[int, tuple[float, int | None]] = {tree: (-math.inf, None) for tree in cuts}
        if defends:
            best = {
                tree: (self._value(self.texts[tree].reward, noise[tree], num), None)
                for tree in cuts
            }
        scores: dict[int, list[float]] = {tree: [] for tree in cuts}
        drawn: dict[int, list[list[int]]] = {tree: [] for tree in cuts}
        for start in range(0, num, self.per_wave):
            numbers = range(start, min(start + self.per_wave, num))
            new = self._draw(numbers, stage, before, limit)
            with self.stats.phase("reward"):
                found = self.scorer.score([(o.tree, [*before[o.tree], *o.token_ids]) for o in new])
            winners: dict[int, Drawn] = {}
            for i, (one, scored) in enumerate(zip(new, found, strict=True)):
                tree, number = one.tree, numbers[i % len(numbers)]
                text = (*before[tree], *one.token_ids)
                score = self.texts[tree].rewards.setdefault(text, scored)
                scores[tree].append(score)
                drawn[tree].append(one.token_ids)
                value = self._value(score, noise[tree], number)
                if value > best[tree][0]:
                    best[tree] = (value, number)
                    winners[tree] = one
                    self.texts[tree].reward = score
            self._adopt(winners, before, kept)
        for tree, cut in cuts.items():
            sequences = drawn[tree] if cut == 0 and limit is None else None
            rewards = torch.tensor(scores[tree], dtype=torch.float32)
            choice = best[tree][1]
            self.texts[tree].stages.append(StageTrace(cut, rewards, choice, sequences))

    def _noise(self, tree: int, stage: int, num: int) -> list[float]:
        """Noise of each continuation and, behind them, of the text that was there."""
        if not self.is_soft:
            return [0.0] * (num + 1)
        keys = stream_keys([(self.responses[tree].prompt.key, stage, _CHOICE, 0)])
        drawn = gumbel(self.config.seed, keys, 0, torch.arange(num + 1)[None])
        return [float(noise) for noise in drawn[0]]

    def _value(self, reward: float, noise: Sequence[float], number: int) -> float:
        """What the winner has most of: the softmax is the arg max under Gumbel noise."""
        return reward / self.config.alpha + noise[number] if self.is_soft else reward

    def _draw(
        self, numbers: range, stage: int, before: Mapping[int, Sequence[int]], limit: int | None
    ) -> list[Drawn]:
        with self.stats.phase("rollout"):
            new = self.forest.draw(
                numbers,
                stage=stage,
                before=before,
                limit=limit,
                on_depth=self.report.bar.advance,
            )
        self.stats.rollout_steps += max(len(one.token_ids) for one in new) - 1
        self.stats.rollouts_run += len(new)
        return new

    def _adopt(
        self, winners: Mapping[int, Drawn], before: Mapping[int, Sequence[int]], kept: int | None
    ) -> None:
        """Let the trees of `winners` hold these texts."""
        with self.stats.phase("commit"):
            self.scorer.keep(
                [(tree, [*before[tree], *one.token_ids]) for tree, one in winners.items()]
            )
            cut = [
                dataclasses.replace(one, token_ids=one.token_ids[:kept]) for one in winners.values()
            ]
            self.forest.keep(cut)
        for one in cut:
            text, num = self.texts[one.tree], len(before[one.tree])
            text.token_ids = [*before[one.tree], *one.token_ids]
            text.columns = {
                name: torch.cat([column[:num], one.columns[name][: len(one.token_ids)]])
                for name, column in text.columns.items()
            }

    def is_complete(self, tree: int) -> bool:
        """Whether the text of a tree has come to its end."""
        token_ids = self.texts[tree].token_ids
        if not token_ids:
            return False
        is_full = len(token_ids) >= self.config.max_new_tokens
        is_ended = token_ids[-1] in self.session.end_ids(self.config)
        return is_full or is_ended or self.forest.stop.is_met(token_ids)

    def results(
        self, choice_kl: Sequence[float] | None, *, is_approximate: bool = False
    ) -> list[PromptResult]:
        """Return the texts as results.

        Args:
            choice_kl: of each tree, the bound on the divergence that the contests add, nats; None
                where no contest ever has two candidates.
            is_approximate: whether that is a bound under an assumption that holds roughly.
        """
        token_ids = [text.token_ids for text in self.texts]
        measured = score_others(
            self.session, self.law.roles, self.responses, token_ids, self.config, self.stats
        )
        self.forest.count(self.stats)
        self.scorer.count(self.stats)
        return [
            self._result(
                tree,
                None if choice_kl is None else choice_kl[tree],
                {role: sums[tree] for role, sums in measured.items()},
                is_approximate,
            )
            for tree in range(len(self.texts))
        ]

    def _result(
        self,
        tree: int,
        choice_kl: float | None,
        logprobs: Mapping[str, float],
        is_approximate: bool,
    ) -> PromptResult:
        text = self.texts[tree]
        certificate = certify_text(
            text.columns,
            self.law,
            extra_kl=choice_kl,
            logprobs=logprobs,
            is_approximate=is_approximate,
        )
        return PromptResult(
            self.session.text_of(text.token_ids, self.config),
            torch.tensor(text.token_ids),
            trace_tokens(text.columns, text.token_ids, torch.tensor([text.reward])),
            certificate,
            text.stages,
        )


class ContestMethod:
    """A method of contests as a session runs it.

    Args:
        session: models, and the reward that judges.
        law: what texts are drawn from.
        config: how they are drawn; alpha weighs a soft choice.
        rounds: the contests of a prompt, at most.
        is_soft: whether winners are drawn from softmax(reward / alpha), or are the best.
    """

    def __init__(
        self,
        session: Session,
        law: Law,
        config: DecodeConfig,
        *,
        rounds: Sequence[Round],
        is_soft: bool,
    ) -> None:
        self.session = session
        self.law = law
        self.config = config
        session.stop_strings(config)
        check_scoring(session, law.roles)
        self.is_soft = is_soft
        self.rounds = rounds
        self.rows_per_prompt = max(part.num for part in rounds)
        self.tokens_per_prompt = sum(part.num_tokens for part in rounds)
        self.num_new = config.max_new_tokens
        self.room = f"max_new_tokens={config.max_new_tokens}"

    def search(self, contests: Contests) -> list[PromptResult]:
        """Hold the contests of a group of prompts."""
        raise NotImplementedError

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a text, for the longest of `prompts`."""
        rows = self.rows_per_prompt
        return text_memory(
            self.session, self.law, prompts, self.config, rows=rows, keeps_texts=True
        )

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> Iterator[ChosenToken]:
        """Decode the first prompts together, one forest for all contests."""
        group = responses[: shape.num_prompts]
        own, counted = DecodeStats(), report.bar.num_done
        try:
            contests = Contests(
                self.session,
                self.law,
                group,
                per_wave=max(1, min(self.rows_per_prompt, shape.max_rows // len(group))),
                config=self.config,
                is_soft=self.is_soft,
                report=report,
                stats=own,
            )
            results = self.search(contests)
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
        for response, result in zip(group, results, strict=True):
            yield from settled_tokens(response.idx, result)

    def conclude(self, result: DecodeResult) -> None:
        """Nothing is estimated, so that there is nothing to warn of."""

    def choice_kl(self, stage: StageTrace) -> float:
        """Return the bound on the divergence that choosing among new texts adds, nats.

        The law of the winner of K equal draws diverges from theirs by at most log K - (K - 1) / K
        where it is the best of them, and by sum_i w_i log(K w_i) where it is drawn with the
        weights w.
        """
        num = len(stage.rewards)
        if not self.is_soft:
            return best_of_kl(num)
        weights = (stage.rewards.double() / self.config.alpha).log_softmax(0)
        return float((weights.exp() * (weights + math.log(num))).sum())


def check_strategy(strategy: object) -> None:
    """Refuse a way to choose between texts that does not exist."""
    if strategy not in ("sample", "greedy"):
        raise InvalidArgument(f"strategy must be one of 'sample', 'greedy', got {strategy!r}")
