"""The log-weights of indirect transfer, and the values of the published code.

The values Q, their errors and their effective sample sizes come from `ops.reweight_sample`, which
takes these log-weights.
"""

from __future__ import annotations

import torch

from ..config import DecodeConfig


def log_weights(
    config: DecodeConfig,
    rewards: torch.Tensor,
    baseline_rewards: torch.Tensor,
    log_ratio: torch.Tensor,
) -> torch.Tensor | None:
    """Return the log-weight of each roll-out, before it is normalised within its candidate.

    Equals, for indirect transfer, `(r - r_BL) / beta` (weights="reward_gap") or
    `r / beta + log pi_sft(tau) - log q(tau)` (weights="log_ratio"). For direct transfer it is None:
    all weights are equal.

    Args:
        config: `transfer`, `weights` and `beta` are read.
        rewards: r `[G, k, n]`.
        baseline_rewards: r_BL `[G, k, n]`.
        log_ratio: `log pi_sft(tau) - log q(tau)` `[G, k, n]`.
    """
    if config.transfer == "direct":
        return None
    if config.weights == "log_ratio":
        return rewards / config.kl_weight + log_ratio
    return (rewards - baseline_rewards) / config.kl_weight


def published_values(
    config: DecodeConfig,
    rewards: torch.Tensor,
    baseline_rewards: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return Q `[G, k]` as the published indirect code computes it, for comparison only.

    Equals `mean_i exp((r_i - r_BL,i) / beta) r_i`, with weights that are not normalised, over the
    first `lengths` `[G, k]` roll-outs.
    """
    weighed = torch.exp((rewards - baseline_rewards) / config.kl_weight) * rewards
    used = torch.arange(rewards.shape[2], device=rewards.device) < lengths[..., None]
    return torch.where(used, weighed, 0.0).sum(-1) / lengths
