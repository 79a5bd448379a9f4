"""The rewards of a step's roll-outs as they come in, and the roll-outs that are still needed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from ..config import DecodeConfig
from ..rollouts.records import Rollout, RolloutId

# A wave of the lazy arg-max runs at least this many roll-outs over all trees, because fewer leave a
# forward pass half empty. On the embedded models 16 and 64 save as much, 256 half as much.
_WAVE = 32
# Scores are compared with this relative tolerance, which covers the rounding of fp32.
_SLACK = 1e-5


class StepValues:
    """Rewards `[G, k, n]` of one step's roll-outs.

    Attributes:
        num_rollouts: roll-outs of each candidate `[G, k]`: fewer than n where the candidate ends
            the response or nothing is rolled out.
        rewards: r `[G, k, n]`, fp32 on the CPU, NaN where none has come in.
        baseline_rewards: r_BL of the same roll-outs, where the weights need it.
        log_ratio: log pi_sft(tau) - log q(tau) of the same roll-outs, where the weights need it.
    """

    def __init__(self, num_rollouts: Sequence[Sequence[int]]) -> None:
        self.num_rollouts = torch.tensor(num_rollouts)
        shape = (*self.num_rollouts.shape, int(self.num_rollouts.max()))
        unknown = torch.full(shape, math.nan, dtype=torch.float32)
        self.rewards, self.baseline_rewards = unknown, unknown.clone()
        self.log_ratio = unknown.clone()

    @staticmethod
    def beside(parts: Sequence[StepValues]) -> StepValues:
        """Return the values of several sets of candidates, one behind the other."""
        whole = StepValues(torch.cat([part.num_rollouts for part in parts], 1).tolist())
        start = 0
        for part in parts:
            _, k, n = part.rewards.shape
            for name in ("rewards", "baseline_rewards", "log_ratio"):
                getattr(whole, name)[:, start : start + k, :n] = getattr(part, name)
            start += k
        return whole

    def record(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[float],
        baseline_rewards: Sequence[float] | None,
        log_ratio: Sequence[float] | None,
    ) -> None:
        """Store the rewards and the log-ratios of `rollouts`."""
        rollout_ids = [(b.id.tree, b.id.candidate_idx, b.id.number) for b in rollouts]
        at = tuple(torch.tensor(column) for column in zip(*rollout_ids, strict=True))
        self.rewards[at] = torch.tensor(rewards, dtype=torch.float32)
        if baseline_rewards is not None:
            self.baseline_rewards[at] = torch.tensor(baseline_rewards, dtype=torch.float32)
        if log_ratio is not None:
            self.log_ratio[at] = torch.tensor(log_ratio, dtype=torch.float32)

    @property
    def is_missing(self) -> torch.Tensor:
        """Roll-outs that have not come in, bool `[G, k, n]`."""
        numbers = torch.arange(self.rewards.shape[2])
        return self.rewards.isnan() & (numbers < self.num_rollouts[..., None])

    @property
    def is_complete(self) -> torch.Tensor:
        """Candidates of which every roll-out has come in, bool `[G, k]`."""
        return ~self.is_missing.any(2)

    def missing_ids(self) -> list[RolloutId]:
        """Return the ids of all roll-outs that have not come in."""
        return [RolloutId(*rollout_id) for rollout_id in self.is_missing.nonzero().tolist()]


class LazyArgmax:
    """The choice of every tree, settled with as few roll-outs as bounds on the reward allow.

    The noise of the choice is drawn first. A candidate's score then lies between the scores that
    it would have if all its missing rewards were the least and the greatest possible. A candidate
    whose upper end lies below another's lower end cannot be chosen. The choice among the others is
    made as always, so the token is that of full evaluation.

    Args:
        prior_logprobs: `[G, k]`.
        noise: Gumbel noise `[G, k]`; zeros for a greedy choice.
        bounds: least and greatest reward.
        config: alpha, estimator and transfer are read.
    """

    def __init__(
        self,
        prior_logprobs: torch.Tensor,
        noise: torch.Tensor,
        bounds: tuple[float, float],
        config: DecodeConfig,
    ) -> None:
        self.base = prior_logprobs.double().cpu() + noise.double().cpu()
        self.bounds = bounds
        self.config = config

    def value_bounds(self, values: StepValues) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the greatest Q `[G, k]` of every candidate, fp64."""
        low, high = (self._values(values, bound) for bound in self.bounds)
        if self.config.transfer == "indirect":
            # Weights that are still unknown may favour any roll-out: only the reward's bounds hold.
            low, high = (torch.full_like(low, bound) for bound in self.bounds)
        return low, high

    def contenders(self, values: StepValues) -> torch.Tensor:
        """Return which candidates may still be chosen, bool `[G, k]`."""
        low, high = (self.base + q / self.config.alpha for q in self.value_bounds(values))
        best = low.max(1, keepdim=True).values
        return high + _SLACK * (1 + high.abs() + best.abs()) >= best

    def next_ids(self, values: StepValues) -> list[RolloutId]:
        """Return the roll-outs to run next; none where every choice is settled."""
        contenders = self.contenders(values)
        missing = values.is_missing & contenders[..., None]
        # A single contender is chosen whatever its value, so its roll-outs are not needed.
        missing &= (contenders.sum(1) > 1)[:, None, None]
        open_trees = missing.flatten(1).any(1).nonzero().squeeze(1).tolist()
        if not open_trees:
            return []
        # Ask for at least half of the missing roll-outs: each wave costs a horizon of forward
        # passes, however few roll-outs it holds.
        share = -(-_WAVE // len(open_trees))
        counts = missing.flatten(1).sum(1).tolist()
        high = self.base + self.value_bounds(values)[1] / self.config.alpha
        rollout_ids: list[RolloutId] = []
        for tree in open_trees:
            rollout_ids += self._soonest(
                tree, high[tree].tolist(), missing[tree], max(share, -(-counts[tree] // 2))
            )
        return sorted(rollout_ids)

    def _soonest(
        self, tree: int, high: list[float], missing: torch.Tensor, share: int
    ) -> list[RolloutId]:
        """Return the `share` roll-outs that tell most about the choice of one tree.

        Each is taken from the candidate whose upper end is highest at that point. Taking one lowers
        this end as if the roll-out had returned the middle of the reward's bounds.
        """
        waiting = [numbers.nonzero().squeeze(1).tolist() for numbers in missing]
        heap = [(-high[idx], idx) for idx, numbers in enumerate(waiting) if numbers]
        heapq.heapify(heap)
        step = (self.bounds[1] - self.bounds[0]) / (2 * self.config.alpha * missing.shape[1])
        rollout_ids: list[RolloutId] = []
        while heap and len(rollout_ids) < share:
            top, idx = heapq.heappop(heap)
            rollout_ids.append(RolloutId(tree, idx, waiting[idx].pop(0)))
            if waiting[idx]:
                heapq.heappush(heap, (top + step, idx))
        return rollout_ids

    def _values(self, values: StepValues, missing_reward: float) -> torch.Tensor:
        alpha = self.config.alpha
        numbers = torch.arange(values.rewards.shape[2])
        is_used = numbers < values.num_rollouts[..., None]
        rewards = values.rewards.double().nan_to_num(nan=missing_reward)
        if self.config.estimator == "mean":
            return torch.where(is_used, rewards, 0.0).sum(2) / values.num_rollouts
        scaled = torch.where(is_used, rewards / alpha, -math.inf)
        return alpha * (scaled.logsumexp(2) - values.num_rollouts.log())
