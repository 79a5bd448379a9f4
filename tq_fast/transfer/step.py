"""One step of all trees: candidates, roll-outs, rewards, and the choice between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from .. import ops
from ..config import DecodeConfig
from ..errors import DecodingError
from ..forest.language import LanguageForest
from ..levers import Levers
from ..ops import philox
from ..results import DecodeStats, Response, StepTrace
from ..rewards.scorer import Scorer
from ..rollouts.graphs import RolloutGraphs
from ..rollouts.records import Branch, Head, KnownRollout, Place, Rollouts, stream_keys
from ..rollouts.run import run_rollouts
from ..rollouts.state import RolloutLaw
from .choice import Candidates, choose, log_ratios
from .pruning import LazyArgmax, StepValues
from .weights import kl_divergence


@dataclasses.dataclass(frozen=True)
class Players:
    """The models of one decode, each over a forest with one tree a slot.

    Attributes:
        baseline: pi_BL; it rolls out.
        sft: pi_sft, or None.
        reward: the target reward.
        baseline_reward: the reward that the baseline was aligned to, where the weights need it.
        law: how the baseline's roll-outs are drawn.
        graphs: run the roll-outs, on a CUDA device.
    """

    baseline: LanguageForest
    sft: LanguageForest | None
    reward: Scorer
    baseline_reward: Scorer | None
    law: RolloutLaw
    graphs: RolloutGraphs | None

    @property
    def by_role(self) -> dict[str, LanguageForest | Scorer]:
        """All that take part."""
        roles = ("baseline", "sft", "reward", "baseline_reward")
        players = {role: getattr(self, role) for role in roles}
        return {role: player for role, player in players.items() if player is not None}

    @property
    def languages(self) -> dict[str, LanguageForest]:
        """Language models by role."""
        return {role: p for role, p in self.by_role.items() if isinstance(p, LanguageForest)}

    @property
    def scorers(self) -> list[Scorer]:
        """Rewards that take part."""
        return [player for player in self.by_role.values() if isinstance(player, Scorer)]

    @property
    def vocab_size(self) -> int:
        """Ids from here on are padding."""
        return self.law.vocab_size


@dataclasses.dataclass(frozen=True)
class Rules:
    """What one decode keeps to from its first step to its last.

    Attributes:
        config: how to decode.
        prior: the role whose policy is reweighted.
        eos: ids that end a response.
        reward_bounds: (lo, hi) of the reward, where declared.
        max_rows: roll-outs that run together, at most.
        levers: speed levers.
    """

    config: DecodeConfig
    prior: str
    eos: tuple[int, ...]
    reward_bounds: tuple[float, float] | None
    max_rows: int
    levers: Levers

    @property
    def is_lazy(self) -> bool:
        """Whether roll-outs are run only until the choice is settled."""
        is_bounded = self.reward_bounds is not None
        return self.levers.lazy_argmax and is_bounded and not self.config.is_published


class Step:
    """One token of every tree in the making.

    Args:
        players: the models.
        responses: one a tree, none of them complete.
        known: what is known of a greedy roll-out of each tree from the step before.
        rules: what the decode keeps to.
        stats: counts and times are added here.
    """

    def __init__(
        self,
        players: Players,
        responses: Sequence[Response],
        known: Sequence[KnownRollout | None],
        rules: Rules,
        stats: DecodeStats,
    ) -> None:
        self.players = players
        self.responses = responses
        self.rules = rules
        self.config = rules.config
        self.stats = stats
        self.waves: list[Rollouts] = []
        self.branches: dict[Place, Branch] = {}
        with stats.phase("candidates"):
            self._propose()
        self.known: Mapping[tuple[int, int], KnownRollout] = {
            (tree, head.candidates.index(start.candidate)): start
            for tree, (head, start) in enumerate(zip(self.heads, known, strict=True))
            if start is not None and start.candidate in head.candidates
        }

    def run(self) -> list[StepTrace]:
        """Roll out and score until every choice is settled; choose."""
        while places := self._next_places():
            self._evaluate(places)
        self._count_skipped()
        with self.stats.phase("reweight"):
            return choose(
                self.candidates,
                self.values,
                prior=self.rules.prior,
                keys=self.keys,
                lazy=self.lazy,
                config=self.config,
            )

    def _propose(self) -> None:
        """The k likeliest next tokens of every tree, and what is to be known of each."""
        languages, config = self.players.languages, self.config
        vocab_size = self.players.vocab_size
        tip = languages[config.candidates_from].tip
        proposed = ops.topk_logprobs(tip, config.k, vocab_size=vocab_size, backend=config.backend)
        for tree, lse in enumerate(proposed.lse.tolist()):
            if not math.isfinite(lse):
                self._fail(tree, f"the logits sum to {lse}")
        logprobs = {}
        for role, forest in languages.items():
            if role == config.candidates_from:
                logprobs[role] = proposed.logprobs
            else:
                logits = forest.tip[:, :vocab_size].float()
                logprobs[role] = logits.gather(1, proposed.ids) - logits.logsumexp(1, keepdim=True)
        drift = None
        if self.players.sft is not None:
            tips = (self.players.baseline.tip, self.players.sft.tip)
            laws = [tip[:, :vocab_size].float().log_softmax(1) for tip in tips]
            drift = kl_divergence(*laws)
        self.heads = [
            Head(ids, response.prompt.key, response.step, config.horizon_at(response.step))
            for ids, response in zip(proposed.ids.tolist(), self.responses, strict=True)
        ]
        keys = stream_keys([(head.key, head.step, 0, 0) for head in self.heads])
        self.keys = keys.to(proposed.ids.device)
        self.lazy = None
        if self.rules.is_lazy:
            noise = torch.zeros_like(proposed.logprobs)
            if config.strategy == "sample":
                noise = philox.gumbel(config.seed, self.keys[:, None], 0, proposed.ids)
            prior = logprobs[self.rules.prior]
            self.lazy = LazyArgmax(prior, noise, self.rules.reward_bounds, config)
        self.values = StepValues([head.num_rollouts(self.rules.eos, config) for head in self.heads])
        self.candidates = Candidates(proposed.ids, logprobs, drift)

    def _next_places(self) -> list[Place]:
        """Roll-outs to run next; none when every tree can choose."""
        if self.lazy is None:
            places = self.values.missing_places()
        else:
            with self.stats.phase("reweight"):
                places = self.lazy.next_places(self.values)
        return places[: self.rules.max_rows]

    def _evaluate(self, places: Sequence[Place]) -> None:
        """Roll out and score at `places`."""
        config, phase = self.config, self.stats.phase
        with phase("rollout"):
            rollouts = run_rollouts(
                self.players.baseline,
                self.heads,
                places,
                known=self.known,
                merge=self.rules.levers.merge_equal,
                eos=self.rules.eos,
                law=self.players.law,
                graphs=self.players.graphs,
            )
            for branch in rollouts.branches:
                if math.isnan(branch.logprob):
                    self._fail(branch.place.tree, "a roll-out met logits that are not finite")
                self.branches[branch.place] = branch
        self.waves.append(rollouts)
        self.stats.rollout_steps += rollouts.num_steps
        with phase("reward"):
            scores = self.players.reward.score(rollouts.branches)
            baseline_scores = ratios = None
            if self.players.baseline_reward is not None:
                baseline_scores = self.players.baseline_reward.score(rollouts.branches)
            if config.needs_log_ratio:
                sft = self.players.sft
                ratios = log_ratios(sft, rollouts.branches, vocab_size=self.players.vocab_size)
        self.values.note(rollouts.branches, scores, baseline_scores, ratios)

    def commit(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Move the KV of the candidates `(tree, candidate_idx)` into the prefixes of all models.

        Those that never ran are encoded.
        """
        baseline, left = self.players.baseline, list(chosen)
        for wave in self.waves:
            ready = [place for place in left if place in wave.first_row]
            if ready:
                rows = [wave.first_row[place] for place in ready]
                tips = wave.first_logits[rows]
                baseline.commit([tree for tree, _ in ready], rows, tips, wave.saved)
                left = [place for place in left if place not in wave.first_row]
        if left:
            tokens = [self.heads[tree].candidates[idx] for tree, idx in left]
            baseline.advance([tree for tree, _ in left], tokens)
        if chosen and self.players.sft is not None:
            tokens = [self.heads[tree].candidates[idx] for tree, idx in chosen]
            self.players.sft.advance([tree for tree, _ in chosen], tokens)

    def known_after(self, tree: int, choice: int) -> KnownRollout | None:
        """What the greedy roll-out of candidate `choice` says of the next step's.

        To be asked before `commit`, which uses the rows of the cache.
        """
        config = self.config
        is_on = config.rollout == "greedy" and self.rules.levers.reuse_greedy
        if not is_on or not self.waves:
            return None
        place = Place(tree, choice, 0)
        branch, rows = self.branches.get(place), self.waves[-1].row_of
        if branch is None or len(branch.tokens) < 2 or branch.tokens[0] in self.rules.eos:
            return None
        child, *rest = branch.tokens
        if rest[-1] in self.rules.eos or config.horizon is None:
            return KnownRollout(child, rest, is_finished=True, saved=None)
        if place not in rows:
            return None
        cache = self.players.baseline.cache
        saved = cache.save([rows[place]], 2, len(branch.tokens))
        return KnownRollout(child, rest, is_finished=False, saved=saved)

    def _count_skipped(self) -> None:
        run = sum(bool(branch.tokens) for branch in self.branches.values())
        possible = sum(
            len(head.candidates) * self.config.rollouts_per_candidate
            for head in self.heads
            if head.horizon
        )
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += possible - run

    def _fail(self, tree: int, message: str) -> NoReturn:
        response = self.responses[tree]
        raise DecodingError(message, prompt_idx=response.idx, step=response.step)
