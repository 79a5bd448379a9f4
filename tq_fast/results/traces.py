"""The records of single choices: of a token among candidates, of a text among others."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


class ByValue:
    """Dataclasses that hold tensors: equal where every field is, NaN being equal to NaN."""

    def __eq__(self, other: object) -> bool:
        return _is_same(self, other) if type(other) is type(self) else NotImplemented

    # A class that holds lists and tensors has no hash.
    __hash__ = None  # type: ignore[assignment]


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return bool(one == other)
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one) if field.compare]
        return all(_is_same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other or (one != one and other != other))


@dataclasses.dataclass(frozen=True, eq=False)
class StepTrace(ByValue):
    """The record of how one token was chosen. Tensors are on the CPU, log-probs in fp32.

    Attributes:
        candidates: token ids `[k]`, by falling proposal probability.
        rewards: rewards of the roll-outs `[k, n]`; NaN where a candidate has fewer than n, and
            where the choice was settled without one.
        q: values Q `[k]`; NaN for a candidate of which not every roll-out was needed.
        q_stderr: Monte-Carlo standard error of Q `[k]`; NaN with a single roll-out.
        ess: effective sample size of each candidate's weights `[k]`.
        prior_logprobs: log pi_prior `[k]`, under the full vocabulary.
        final_logprobs: log pi_alg `[k]`; NaN unless every Q is known.
        kl_to_sft: KL(pi_alg || pi_sft) of this step, nats; None without an SFT model. Where some Q
            is not known, the greatest value that the bounds on the reward allow.
        kl_to_baseline: KL(pi_alg || pi_BL) of this step, likewise; None where no
            baseline took part.
        choice: index of the chosen candidate.
        kl_baseline_to_sft: KL(pi_BL || pi_sft) of this step over the whole vocabulary, nats; None
            unless both take part.
        value: what a value head says of the text before this token, in units of the reward; None
            without one.
        agents: which of several baselines proposed and rolled out each candidate, int64 `[k]`;
            None where there is one.
    """

    candidates: torch.Tensor
    rewards: torch.Tensor
    q: torch.Tensor
    q_stderr: torch.Tensor
    ess: torch.Tensor
    prior_logprobs: torch.Tensor
    final_logprobs: torch.Tensor
    kl_to_sft: float | None
    kl_to_baseline: float | None
    choice: int
    kl_baseline_to_sft: float | None = None
    value: float | None = None
    agents: torch.Tensor | None = None

    @property
    def num_rollouts(self) -> torch.Tensor:
        """The number of rewards that enter Q of each candidate, int64 `[k]`."""
        return (~self.rewards.isnan()).sum(-1)

    @property
    def token_id(self) -> int:
        """The token that was chosen."""
        return int(self.candidates[self.choice])

    @property
    def is_complete(self) -> bool:
        """Whether every Q is known: the choice was not settled by bounds on the reward."""
        return not bool(self.q.isnan().any())

    @property
    def prior_mass(self) -> float:
        """Prior probability of the k candidates together."""
        return float(self.prior_logprobs.logsumexp(-1).exp())


@dataclasses.dataclass(frozen=True, eq=False)
class StageTrace(ByValue):
    """The record of one choice between whole texts, or blocks of them.

    Attributes:
        cut: response tokens that all of them begin with.
        rewards: rewards of the K texts that were drawn, fp32 `[K]` on the CPU.
        choice: index of the one that was chosen; None where the text that was there before stayed.
        sequences: their token ids, where they are whole texts (cut is 0); None for others.
    """

    cut: int
    rewards: torch.Tensor
    choice: int | None
    sequences: list[list[int]] | None = None
