"""What to say where Monte-Carlo noise, rather than the reward, decides the next token."""

from __future__ import annotations

from collections.abc import Iterable

from ..results import StepTrace


def count_noisy_steps(trace: Iterable[StepTrace], alpha: float) -> int:
    """Steps at which the standard error of some candidate's Q exceeds `alpha`.

    0 with a single roll-out, from which no error can be estimated.
    """
    return sum(bool((step.q_stderr > alpha).any()) for step in trace)


def describe_noise(num_noisy: int, num_steps: int, alpha: float) -> str:
    """The sentence about `num_noisy` of `num_steps` steps."""
    return (
        f"warning: the standard error of Q exceeded alpha={alpha:g} for some candidate in "
        f"{num_noisy} of {num_steps} steps; use more roll-outs (--num-rollouts) or a larger --alpha"
    )
