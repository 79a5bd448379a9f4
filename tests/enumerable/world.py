"""Worlds so small that everything can be written down (fp64): laws, values, optima, bounds.

A world has V tokens and responses of exactly T. A policy is a list of tables, one a step: log-probs
`[M, V**t, V]` after every history of t tokens, for M worlds at once. A history is its tokens read
as a number in base V, the first token the highest digit. Definitions are those of arXiv 2405.20495;
nothing of the package is used.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import torch

Policy: TypeAlias = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class World:
    """M worlds with their policy and rewards.

    Attributes:
        sft: pi_sft.
        reward: r of every response `[M, V**T]`, in [0, 1].
        baseline_reward: r_BL of every response, in [0, 1].
        alpha, beta: `[M]`.
    """

    sft: Policy
    reward: torch.Tensor
    baseline_reward: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    @property
    def num_steps(self) -> int:
        return len(self.sft)


def draw_worlds(
    num: int, vocab_size: int, num_steps: int, generator: torch.Generator, *, spread: float = 1.0
) -> World:
    """Draw M = `num` worlds: normal logits, uniform rewards, alpha and beta from 0.05 to 5."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def temperature() -> torch.Tensor:
        return torch.exp(math.log(0.05) + math.log(100.0) * rand(num))

    sft = [
        torch.randn(num, vocab_size**t, vocab_size, generator=generator, dtype=torch.float64)
        for t in range(num_steps)
    ]
    num_responses = vocab_size**num_steps
    return World(
        [(spread * table).log_softmax(-1) for table in sft],
        rand(num, num_responses),
        rand(num, num_responses),
        temperature(),
        temperature(),
    )


def log_law(policy: Policy) -> torch.Tensor:
    """Return log rho(y) `[M, V**T]` of every response."""
    law = policy[0].new_zeros(policy[0].shape[0], 1)
    for table in policy:
        law = (law[..., None] + table).flatten(1)
    return law


def policy_of(law: torch.Tensor, like: Policy) -> Policy:
    """Return the token policy of the unnormalised log-law `[M, V**T]` over responses."""
    tables: Policy = []
    for table in reversed(like):
        by_token = law.view(table.shape)
        law = by_token.logsumexp(-1)
        tables.append(by_token - law[..., None])
    return tables[::-1]


def kl_optimum(sft: Policy, reward: torch.Tensor, beta: torch.Tensor) -> Policy:
    """Return the policy of rho(y) proportional to rho_sft(y) exp(r(y) / beta)."""
    return policy_of(log_law(sft) + reward / beta[:, None], sft)


def state_values(policy: Policy, worth: torch.Tensor) -> list[torch.Tensor]:
    """Return Q(s, z) `[M, V**t, V]`, the mean `worth` `[M, V**T]` if `policy` completes (s, z)."""
    values: list[torch.Tensor] = []
    for table in reversed(policy):
        by_token = worth.view(table.shape)
        values.append(by_token)
        worth = (table.exp() * by_token).sum(-1)
    return values[::-1]


def reweight(
    prior: Policy, values: list[torch.Tensor], alpha: torch.Tensor, keep: Policy | None = None
) -> Policy:
    """Return pi_alg = softmax(log prior + Q / alpha) over the tokens of `keep`, else over all."""
    scores = [p + q / alpha[:, None, None] for p, q in zip(prior, values, strict=True)]
    if keep is not None:
        scores = [
            s.masked_fill(k == -math.inf, -math.inf) for s, k in zip(scores, keep, strict=True)
        ]
    return [score.log_softmax(-1) for score in scores]


def keep_largest(policy: Policy, k: int) -> Policy:
    """Return `policy` with all but the k largest of every state at -inf, unnormalised."""
    kept = []
    for table in policy:
        top = table.topk(k, dim=-1)
        kept.append(torch.full_like(table, -math.inf).scatter(-1, top.indices, top.values))
    return kept


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) over the last axis; both are log-probs."""
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)


def mean_over_states(policy: Policy, per_state: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum over steps of the mean of `per_state` `[M, V**t]` over `policy`'s states."""
    law = policy[0].new_zeros(policy[0].shape[0], 1)
    total = policy[0].new_zeros(policy[0].shape[0])
    for table, worth in zip(policy, per_state, strict=True):
        total += torch.where(law == -math.inf, 0.0, law.exp() * worth).sum(-1)
        law = (law[..., None] + table).flatten(1)
    return total


def mean_divergence(policy: Policy, p: Policy, q: Policy) -> torch.Tensor:
    """Return sum_t E_{s ~ policy} KL(p(.|s) || q(.|s)) `[M]`."""
    return mean_over_states(policy, [divergence(a, b) for a, b in zip(p, q, strict=True)])
