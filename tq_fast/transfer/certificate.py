"""The certificate of a response: its divergences, and the bound under the prior in use."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

from ..config import DecodeConfig, Role
from ..results import Certificate, StepTrace

# With at most this many unknown values, every corner of their box is tried.
_MAX_CORNERS = 10


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

    As a function of one u the divergence falls and then rises, so its maximum over the box lies at
    a corner. With at most ten unknown u all corners are tried and the result is exact; with more it
    is max log p / q, which is never less than the divergence.

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


def known_ess(trace: Sequence[StepTrace]) -> list[float]:
    """Return the effective sample sizes of all candidates with more than one roll-out."""
    return [
        value
        for step in trace
        for value in step.ess[(step.num_rollouts > 1) & ~step.ess.isnan()].tolist()
    ]


def certify(
    trace: Sequence[StepTrace],
    config: DecodeConfig,
    *,
    prior: Role,
    reward_bounds: tuple[float, float] | None,
) -> Certificate:
    """Return the certificate of a response whose tokens were chosen as `trace` says.

    Args:
        trace: the step of every token.
        config: alpha, beta, transfer, weights, rollout and horizon are read.
        prior: the role whose policy was reweighted.
        reward_bounds: (lo, hi) of the reward, where declared.
    """
    kl_to_sft = _total(step.kl_to_sft for step in trace)
    kl_to_baseline = _total(step.kl_to_baseline for step in trace)
    drift = _total(step.kl_baseline_to_sft for step in trace)
    log_prior_mass = sum(float(step.prior_logprobs.logsumexp(-1)) for step in trace)
    ess = [] if config.is_published else known_ess(trace)
    is_complete = all(step.is_complete for step in trace)
    # Sampled roll-outs make Q, and with it pi_alg, random: by convexity the divergence given the
    # roll-outs is on average no less than that of the law that averages over them.
    is_noisy = config.rollout == "sample" and config.horizon != 0
    gap_reduction = None
    if config.transfer == "direct" and is_complete:
        if prior == "baseline" and kl_to_baseline is not None:
            gap_reduction = config.alpha * kl_to_baseline
        elif prior == "sft" and kl_to_sft is not None and drift is not None:
            gap_reduction = config.alpha * (kl_to_sft - drift)
    return Certificate(
        kl_to_sft=kl_to_sft,
        kl_to_baseline=kl_to_baseline,
        log_prior_mass=log_prior_mass,
        prior=prior,
        kl_bound=_kl_bound(len(trace), log_prior_mass, config, prior, reward_bounds),
        gap_reduction=gap_reduction,
        median_ess=statistics.median(ess) if ess else None,
        min_ess=min(ess) if ess else None,
        kl_kind="exact" if is_complete and not is_noisy else "at most",
    )


def _total(divergences: Iterable[float | None]) -> float | None:
    """Return the sum over the steps; None where a model took no part."""
    known = list(divergences)
    return None if None in known else sum(value for value in known if value is not None)


def _kl_bound(
    num_steps: int,
    log_prior_mass: float,
    config: DecodeConfig,
    prior: Role,
    reward_bounds: tuple[float, float] | None,
) -> float | None:
    """Return the bound of Theorem 1 on KL(rho_alg || rho_sft); None where it does not hold."""
    is_direct = config.transfer == "direct"
    if reward_bounds is None:
        return None
    # The theorem assumes 0 <= r <= r_max. A constant added to the reward changes no token, so the
    # width of the bounds serves as r_max.
    r_max = reward_bounds[1] - reward_bounds[0]
    bound = num_steps * r_max / config.alpha - log_prior_mass
    if prior == "sft":
        return bound if is_direct or config.weights != "published" else None
    if not is_direct or config.beta is None:
        return None
    return bound + r_max / config.beta
