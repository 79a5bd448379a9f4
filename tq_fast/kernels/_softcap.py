"""The soft cap on scores and logits, by the tanh that Triton does not have."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def soften(scores, softcap):
    """softcap * tanh(scores / softcap), without cancellation near 0."""
    x = scores / softcap
    square = x * x
    # Below 0.1 the next term of the series is under 1e-9 of x.
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    tanh = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
    return softcap * tl.where(tl.abs(x) < 0.1, series, tanh)
