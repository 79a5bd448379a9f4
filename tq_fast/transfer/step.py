"""One step of all trees: candidates, roll-outs, rewards, and the choice between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from .. import ops
from ..config import DecodeConfig, SpeedOptions
from ..errors import DecodingError
from ..forest.language import LanguageForest
from ..ops import philox
from ..results import DecodeStats, Response, StepTrace
from ..rewards.scorer import Scorer
from ..rollouts.graphs import RolloutGraphs
from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from ..rollouts.run import run_rollouts
from ..rollouts.state import RolloutSampler
from ..rollouts.streams import stream_keys
from .choice import Candidates, choose, log_ratios
from .pruning import LazyArgmax, StepValues
from .weights import kl_divergence


@dataclasses.dataclass(frozen=True)
class Roles:
    """The models of one decode, each over a forest with one tree a slot.

    Attributes:
        baseline: pi_BL; it rolls out.
        sft: pi_sft, or None.
        reward: the target reward.
        baseline_reward: the reward that the baseline was aligned to, where the weights need it.
        sampler: how the baseline's roll-outs are drawn.
        graphs: run the roll-outs, on a CUDA device.
    """

    baseline: LanguageForest
    sft: LanguageForest | None
    reward: Scorer
    baseline_reward: Scorer | None
    sampler: RolloutSampler
    graphs: RolloutGraphs | None

    @property
    def by_role(self) -> dict[str, LanguageForest | Scorer]:
        """All that take part."""
        names = ("baseline", "sft", "reward", "baseline_reward")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def languages(self) -> dict[str, LanguageForest]:
        """Language models by role."""
        return {role: p for role, p in self.by_role.items() if isinstance(p, LanguageForest)}

    @property
    def scorers(self) -> list[Scorer]:
        """Rewards that take part."""
        return [part for part in self.by_role.values() if isinstance(part, Scorer)]

    @property
    def vocab_size(self) -> int:
        """Ids from here on are padding."""
        return self.sampler.vocab_size


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What one decode keeps to from its first step to its last.

    Attributes:
        config: how to decode.
        prior: the role whose policy is reweighted.
        eos: ids that end a response.
        reward_bounds: (lo, hi) of the reward, where declared.
        max_rows: roll-outs that run together, at most.
        speed: speed speed.
    """

    config: DecodeConfig
    prior: str
    eos: tuple[int, ...]
    reward_bounds: tuple[float, float] | None
    max_rows: int
    speed: SpeedOptions

    @property
    def is_lazy(self) -> bool:
        """Whether roll-outs are run only until the choice is settled."""
        is_bounded = self.reward_bounds is not None
        return self.speed.lazy_argmax and is_bounded and not self.config.is_published


class Step:
    """One token of every tree in the making.

    Args:
        roles: the models.
        responses: one a tree, none of them complete.
        known: what is known of a greedy roll-out of each tree from the step before.
        plan: what the decode keeps to.
        stats: counts and times are added here.
    """

    def __init__(
        self,
        roles: Roles,
        responses: Sequence[Response],
        known: Sequence[ReusedRollout | None],
        plan: DecodePlan,
        stats: DecodeStats,
    ) -> None:
        self.roles = roles
        self.responses = responses
        self.plan = plan
        self.config = plan.config
        self.stats = stats
        self.waves: list[RolloutWave] = []
        self.rollouts: dict[RolloutId, Rollout] = {}
        with stats.phase("candidates"):
            self._propose()
        self.known: Mapping[tuple[int, int], ReusedRollout] = {
            (tree, root.candidates.index(start.candidate)): start
            for tree, (root, start) in enumerate(zip(self.roots, known, strict=True))
            if start is not None and start.candidate in root.candidates
        }

    def run(self) -> list[StepTrace]:
        """Roll out and score until every choice is settled; choose."""
        while rollout_ids := self._next_ids():
            self._evaluate(rollout_ids)
        self._count_skipped()
        with self.stats.phase("reweight"):
            return choose(
                self.candidates,
                self.values,
                prior=self.plan.prior,
                keys=self.keys,
                lazy=self.lazy,
                config=self.config,
            )

    def _propose(self) -> None:
        """The k likeliest next tokens of every tree, and what is to be known of each."""
        languages, config = self.roles.languages, self.config
        vocab_size = self.roles.vocab_size
        next_logits = languages[config.candidates_from].next_logits
        proposed = ops.topk_logprobs(
            next_logits, config.k, vocab_size=vocab_size, backend=config.backend
        )
        for tree, lse in enumerate(proposed.lse.tolist()):
            if not math.isfinite(lse):
                self._fail(tree, f"the logits sum to {lse}")
        logprobs = {}
        for role, forest in languages.items():
            if role == config.candidates_from:
                logprobs[role] = proposed.logprobs
            else:
                logits = forest.next_logits[:, :vocab_size].float()
                logprobs[role] = logits.gather(1, proposed.ids) - logits.logsumexp(1, keepdim=True)
        drift = None
        if self.roles.sft is not None:
            forests = (self.roles.baseline, self.roles.sft)
            laws = [forest.next_logits[:, :vocab_size].float().log_softmax(1) for forest in forests]
            drift = kl_divergence(*laws)
        self.roots = [
            Root(ids, response.prompt.key, response.step, config.horizon_at(response.step))
            for ids, response in zip(proposed.ids.tolist(), self.responses, strict=True)
        ]
        keys = stream_keys([(root.key, root.step, 0, 0) for root in self.roots])
        self.keys = keys.to(proposed.ids.device)
        self.lazy = None
        if self.plan.is_lazy:
            noise = torch.zeros_like(proposed.logprobs)
            if config.strategy == "sample":
                noise = philox.gumbel(config.seed, self.keys[:, None], 0, proposed.ids)
            prior = logprobs[self.plan.prior]
            self.lazy = LazyArgmax(prior, noise, self.plan.reward_bounds, config)
        self.values = StepValues([root.num_rollouts(self.plan.eos, config) for root in self.roots])
        self.candidates = Candidates(proposed.ids, logprobs, drift)

    def _next_ids(self) -> list[RolloutId]:
        """Roll-outs to run next; none when every tree can choose."""
        if self.lazy is None:
            rollout_ids = self.values.missing_ids()
        else:
            with self.stats.phase("reweight"):
                rollout_ids = self.lazy.next_ids(self.values)
        return rollout_ids[: self.plan.max_rows]

    def _evaluate(self, rollout_ids: Sequence[RolloutId]) -> None:
        """Roll out and score at `rollout_ids`."""
        config, phase = self.config, self.stats.phase
        with phase("rollout"):
            wave = run_rollouts(
                self.roles.baseline,
                self.roots,
                rollout_ids,
                reused=self.known,
                merge=self.plan.speed.merge_equal,
                eos=self.plan.eos,
                sampler=self.roles.sampler,
                graphs=self.roles.graphs,
            )
            for rollout in wave.rollouts:
                if math.isnan(rollout.logprob):
                    self._fail(rollout.id.tree, "a roll-out met logits that are not finite")
                self.rollouts[rollout.id] = rollout
        self.waves.append(wave)
        self.stats.rollout_steps += wave.num_steps
        with phase("reward"):
            scores = self.roles.reward.score(wave.rollouts)
            baseline_scores = ratios = None
            if self.roles.baseline_reward is not None:
                baseline_scores = self.roles.baseline_reward.score(wave.rollouts)
            if config.needs_log_ratio:
                sft = self.roles.sft
                ratios = log_ratios(sft, wave.rollouts, vocab_size=self.roles.vocab_size)
        self.values.record(wave.rollouts, scores, baseline_scores, ratios)

    def commit(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Move the KV of the candidates `(tree, candidate_idx)` into the prefixes of all models.

        Those that never ran are encoded.
        """
        baseline, left = self.roles.baseline, list(chosen)
        for wave in self.waves:
            ready = [rollout_id for rollout_id in left if rollout_id in wave.first_row]
            if ready:
                rows = [wave.first_row[rollout_id] for rollout_id in ready]
                next_logits = wave.first_logits[rows]
                baseline.commit([tree for tree, _ in ready], rows, next_logits, wave.saved)
                left = [rollout_id for rollout_id in left if rollout_id not in wave.first_row]
        if left:
            tokens = [self.roots[tree].candidates[idx] for tree, idx in left]
            baseline.advance([tree for tree, _ in left], tokens)
        if chosen and self.roles.sft is not None:
            tokens = [self.roots[tree].candidates[idx] for tree, idx in chosen]
            self.roles.sft.advance([tree for tree, _ in chosen], tokens)

    def reused_after(self, tree: int, choice: int) -> ReusedRollout | None:
        """What the greedy roll-out of candidate `choice` says of the next step's.

        To be asked before `commit`, which uses the rows of the cache.
        """
        config = self.config
        is_on = config.rollout == "greedy" and self.plan.speed.reuse_greedy
        if not is_on or not self.waves:
            return None
        rollout_id = RolloutId(tree, choice, 0)
        rollout, rows = self.rollouts.get(rollout_id), self.waves[-1].row_of
        if rollout is None or len(rollout.tokens) < 2 or rollout.tokens[0] in self.plan.eos:
            return None
        child, *rest = rollout.tokens
        if rest[-1] in self.plan.eos or config.horizon is None:
            return ReusedRollout(child, rest, is_finished=True, saved=None)
        if rollout_id not in rows:
            return None
        cache = self.roles.baseline.cache
        saved = cache.save([rows[rollout_id]], 2, len(rollout.tokens))
        return ReusedRollout(child, rest, is_finished=False, saved=saved)

    def _count_skipped(self) -> None:
        run = sum(bool(rollout.tokens) for rollout in self.rollouts.values())
        possible = sum(
            len(root.candidates) * self.config.rollouts_per_candidate
            for root in self.roots
            if root.horizon
        )
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += possible - run

    def _fail(self, tree: int, message: str) -> NoReturn:
        response = self.responses[tree]
        raise DecodingError(message, prompt_idx=response.idx, step=response.step)
