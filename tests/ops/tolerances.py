"""Every tolerance of the op tests, each with its reason. Errors are against float64.

eps32 = 1.2e-7 and eps16 = 7.8e-3 are the spacings of fp32 and bf16 numbers above 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Relative error of an lse over at most 2^18 fp32 terms. Exponentials are good to 2 eps32 and sums
# are blocked, so a few eps32; 2e-6 is the bound that the contract names.
LSE_REL = 2e-6
LSE_ABS = 2e-6

# A log-probability is a difference of two fp32 numbers as large as the spread of the logits: its
# error is a few eps32 of that spread, here below 64. It is compared in absolute terms because a
# difference near 0 has no relative digits.
LOGPROB_ABS = 1e-5
LOGPROB_REL = 2e-6

# A sum of T <= 128 log-probabilities, summed in fp64: T errors of LOGPROB_ABS that do not align.
TRAJECTORY_ABS = 1e-4
TRAJECTORY_REL = 1e-5

# Logits from an fp32 matmul over D <= 512 products of unit numbers: D^0.5 eps32 a logit, times T.
LINEAR_ABS = 1e-3
LINEAR_REL = 1e-5

# Computed in float64 and rounded to fp32 once: half an eps32, with room for a kernel that sums
# over at most 64 roll-outs in another order.
REWEIGHT_REL = 1e-6
REWEIGHT_ABS = 1e-6

# Attention: convex combinations of values of order 1. In fp32 the scores (d <= 128 products) and
# the softmax lose a few eps32. bf16 inputs are exact, but a kernel may round the probabilities
# and each of the two parts it merges to bf16: three half spacings of values of order 1 to 2.
ATTENTION_OUT = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# The lse stays in fp32; kernels may round scaled queries to the input type first (eps16 * score).
ATTENTION_LSE = {torch.float32: 5e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}

# One fp32 convex combination, and one rounding to the output type.
MERGE_OUT = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

# A linear layer beside torch's own: sums of at most 2050 products of unit numbers in another order
# (2050^0.5 eps32 of the sum, itself below 200), and half a spacing of a 16-bit result below 256.
FEW_ROWS = {torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}

# Int8 weights beside the product of dequantised ones in float64: sums of D <= 2050 fp32 products
# in another order (2050^0.5 eps32 of what the terms could add up to), half a spacing of the result,
# and eps32 for the scale and the bias.
INT8_TERMS = 6e-6
INT8_ROUNDED = {torch.float32: 3e-7, torch.bfloat16: 3.95e-3, torch.float16: 4.95e-4}

# Half a decoder layer beside the same steps in PyTorch, whose own error it may have twice (rounded
# at the same places, but sums in another order fall to other neighbours), and in fp32 a few eps32
# of values below 100.
LAYER_FACTOR = 2.0
LAYER = {torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}

# The same fp32 sums in another order. Triton lays a tile out by the alignment of the strides, so
# that inputs of other strides are added up in another order: an eps32 of an lse below 16 either
# way, and a few of them where log-probabilities are added or subtracted.
REORDERED_REL = 1e-6
REORDERED_ABS = 5e-6


def assert_same_sums(backend: str, got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Compare two calls whose inputs differ in their strides: bit for bit but for Triton's floats.

    Integers and booleans are the same on every backend.
    """
    for a, b in zip(got, expected, strict=True):
        if backend == "triton" and a.dtype.is_floating_point:
            torch.testing.assert_close(a, b, rtol=REORDERED_REL, atol=REORDERED_ABS)
        else:
            assert torch.equal(a, b)
