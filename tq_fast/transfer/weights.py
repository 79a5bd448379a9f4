"""Pure functions between rewards and the next token: weights, divergences, the certificate.

The values Q, their errors and their effective sample sizes come from `ops.reweight_sample`; what
goes in (the log-weights of indirect transfer) and what is reported beside it stands here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ..config import DecodeConfig
from ..results import Certificate

# Unknown values up to which all corners of their box are tried.
_MAX_CORNERS = 10


def log_weights(
    config: DecodeConfig,
    rewards: torch.Tensor,
    baseline_rewards: torch.Tensor | None,
    log_ratio: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the log-weight of each roll-out, before it is normalised within its candidate.

    Equals, for indirect transfer, `(r - r_BL) / beta` (weights="reward_gap") or
    `r / beta + log pi_sft(tau) - log q(tau)` (weights="log_ratio"); None, all weights equal, for
    direct transfer. Natural log.

    Args:
        config: `transfer`, `weights` and `beta` are read.
        rewards: r `[G, k, n]`.
        baseline_rewards: r_BL `[G, k, n]`.
        log_ratio: `log pi_sft(tau) - log q(tau)` `[G, k, n]`.
    """
    if config.transfer == "direct":
        return None
    if config.weights == "log_ratio":
        return rewards / config.beta + log_ratio
    return (rewards - baseline_rewards) / config.beta


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
    weighed = torch.exp((rewards - baseline_rewards) / config.beta) * rewards
    used = torch.arange(rewards.shape[2], device=rewards.device) < lengths[..., None]
    return torch.where(used, weighed, 0.0).sum(-1) / lengths


def kl_divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) in nats over the last axis; exact, since p lives on the k candidates.

    Args:
        logprobs: log p `[..., k]`, -inf allowed.
        reference_logprobs: log q `[..., k]` under q's full vocabulary.
    """
    probs = logprobs.exp()
    terms = torch.where(probs > 0, probs * (logprobs - reference_logprobs), 0.0)
    return terms.sum(-1)


def greatest_kl(
    prior_logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> float:
    """Return an upper bound on KL(p || q) in nats, p = softmax(log prior + u), low <= u <= high.

    In each u alone the divergence falls and then rises, so its maximum over the box is at a corner:
    exact while at most ten u are unknown, and beyond that max log p / q, which is never less.

    Args:
        prior_logprobs: log prior `[k]`.
        reference_logprobs: log q `[k]`.
        low, high: Q / alpha at its least and greatest `[k]`.
    """
    prior, reference = prior_logprobs.double(), reference_logprobs.double()
    low, high = low.double(), high.double()
    unknown = (high > low).nonzero().squeeze(1)
    if len(unknown) > _MAX_CORNERS:
        top = (prior - reference + high).max()
        return float(top - (prior + low).logsumexp(0))
    corners = torch.arange(2 ** len(unknown))[:, None] >> torch.arange(len(unknown)) & 1
    scores = low.repeat(len(corners), 1)
    scores[:, unknown] = torch.where(corners.bool(), high[unknown], low[unknown])
    logprobs = (prior + scores).log_softmax(1)
    return float(kl_divergence(logprobs, reference.expand_as(logprobs)).max())


def certify(
    config: DecodeConfig,
    *,
    prior: str,
    num_steps: int,
    kl_to_sft: float | None,
    kl_to_baseline: float | None,
    kl_baseline_to_sft: float | None,
    log_prior_mass: float,
    ess: Sequence[float],
    is_exact: bool,
    reward_bounds: tuple[float, float] | None,
) -> Certificate:
    """Return the certificate of a response of `num_steps` tokens; divergences are sums over them.

    `ess` are the effective sample sizes of all candidates with more than one roll-out; `is_exact`
    is false where a choice was settled by bounds on the reward, so that divergences are bounds too.
    """
    bound = gap_reduction = None
    is_direct = config.transfer == "direct"
    is_bounded = config.beta is not None and is_direct
    if prior == "sft":
        is_bounded = is_direct or config.weights != "published"
    if reward_bounds is not None and is_bounded:
        # The theorem takes 0 <= r <= r_max; a reward moved by a constant chooses the same tokens.
        r_max = reward_bounds[1] - reward_bounds[0]
        bound = num_steps * r_max / config.alpha - log_prior_mass
        if prior == "baseline":
            bound += r_max / config.beta
    is_told = is_direct and is_exact
    if is_told and prior == "baseline" and kl_to_baseline is not None:
        gap_reduction = config.alpha * kl_to_baseline
    elif is_told and prior == "sft" and kl_baseline_to_sft is not None:
        gap_reduction = config.alpha * (kl_to_sft - kl_baseline_to_sft)
    return Certificate(
        kl_to_sft,
        kl_to_baseline,
        log_prior_mass,
        prior,
        bound,
        gap_reduction,
        statistics.median(ess) if ess else None,
        min(ess) if ess else None,
    )
