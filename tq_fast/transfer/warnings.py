"""Noise and collapse: warnings where chance, rather than the reward, decides the next token."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..config import DecodeConfig
from ..errors import warn_caller
from ..results import StepTrace
from .certificate import known_ess


def warn_of_noise(traces: Sequence[Sequence[StepTrace]], config: DecodeConfig) -> None:
    """Warn when the Monte-Carlo error of Q exceeds alpha: noise then dominates the choice."""
    steps = [step for trace in traces for step in trace]
    num_noisy = count_noisy_steps(steps, config.alpha)
    if num_noisy:
        warn_caller(describe_noise(num_noisy, len(steps), config.alpha))


def count_noisy_steps(steps: Iterable[StepTrace], alpha: float) -> int:
    """Count the steps at which the standard error of some candidate's Q exceeds `alpha`.

    With a single roll-out no error can be estimated, and the count is 0.
    """
    return sum(bool((step.q_stderr > alpha).any()) for step in steps)


def describe_noise(num_noisy: int, num_steps: int, alpha: float) -> str:
    """Say that `num_noisy` of `num_steps` steps are noisy, and what helps."""
    return (
        f"the standard error of Q exceeds alpha={alpha} for some candidate in {num_noisy} of "
        f"{num_steps} steps; use more roll-outs (num_rollouts) or a larger alpha"
    )


def warn_of_collapse(traces: Sequence[Sequence[StepTrace]], config: DecodeConfig) -> None:
    """Warn when the weights of indirect transfer leave a value to a single roll-out."""
    is_weighed = config.transfer == "indirect" and not config.is_published
    if not traces or not is_weighed or config.horizon == 0:
        return
    if config.rollouts_per_candidate == 1:
        warn_caller(
            f"transfer='indirect' with one roll-out a candidate (num_rollouts="
            f"{config.num_rollouts}, rollout={config.rollout!r}) weighs nothing and equals direct "
            "transfer; use more sampled roll-outs"
        )
        return
    ess = [value for trace in traces for value in known_ess(trace)]
    if ess and has_collapsed(ess, config.num_rollouts):
        warn_caller(
            f"the weights of indirect transfer leave {statistics.median(ess):.2f} of "
            f"{config.num_rollouts} roll-outs in effect (median effective sample size): most "
            "values hang on a single one; use more roll-outs (num_rollouts) or a larger beta, now "
            f"{config.beta}"
        )


def has_collapsed(ess: Sequence[float], num_rollouts: int) -> bool:
    """Return whether most candidates have fewer than two effective roll-outs.

    With few roll-outs the limit is a quarter of the way from 1 to n, because the effective sample
    size of a few weights may fall short of 2 even where they are nearly equal.
    """
    return statistics.median(ess) < min(2.0, 1 + (num_rollouts - 1) / 4)
