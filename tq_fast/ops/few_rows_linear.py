"""A linear layer for few rows, with the weights as they lie in the model.

    y[n, o] = scale[o] sum_d x[n, d] weight[o, d] + bias[o]        summed in fp32, rounded once

Without a scale, the weights have the dtype of x. With one they are int8, quantised to a symmetric
range for each output: the product is that of the dequantised weights `scale[o] weight[o, d]`, which
are neither rounded to the dtype of x nor kept.

On a CPU with AMX, bf16 rows meet int8 weights as integers: up to 256 rows of up to 65,536 numbers
are written in units of 2^-22 of the largest power of two in the row, exactly but for numbers below
2^-15 of it. A row that holds NaN or an infinity becomes NaN.

Bytes: the weights are read once, `O * D * itemsize`, which is nearly all there is to do for a few
rows. A row of the result does not depend on the other rows, their number or the threads, bit for
bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import _checks
from ._dispatch import Backend, Op, native_function


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)`, made for a handful of rows.

    With `scale` it is `linear(x, scale[:, None] * weight, bias)`.

    Args:
        x: `[N, D]` or `[N, T, D]`, floating point.
        weight: `[O, D]`, the dtype of `x`; int8 with a scale.
        bias: `[O]`, the dtype of `x`, or None.
        scale: `[O]`, fp32, or None where the weight is not int8.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        `[N, O]` or `[N, T, O]`, contiguous, in the dtype of `x`.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    op = "few_rows_linear"
    _checks.require_tensors(op, x=x, weight=weight, **_checks.given(bias=bias, scale=scale))
    if x.dim() not in (2, 3):
        raise InvalidArgument(
            f"{op}: x has shape {list(x.shape)}, expected 2 or 3 axes, [N, D] or [N, T, D]"
        )
    _checks.require_float(op, "x", x)
    _checks.require_dim(op, "weight", weight, 2, "[O, D]")
    shape = (weight.shape[0], x.shape[-1])
    _checks.require_shape(op, "weight", weight, shape, "[O, D] with the D of x")
    _checks.require_weight(op, "", weight, scale, x.dtype)
    if bias is not None:
        _checks.require_shape(op, "bias", bias, (weight.shape[0],), "[O]")
        _checks.require_dtype(op, "bias", bias, x.dtype)
    _checks.refuse_grad(op, x=x, weight=weight, bias=bias, scale=scale)
    return _OP(backend, x, weight, bias, scale)


def few_rows_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The reference of `few_rows_linear`: plain PyTorch, fp32 inside (fp64 for fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = torch.nn.functional.linear(x.to(wide), weight.to(wide))
    if scale is not None:
        product = product * scale.to(wide)
    if bias is not None:
        product = product + bias.to(wide)
    return product.to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _refuse_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> str | None:
    return _checks.refuse_float64(x=x)


_OP = Op(
    "few_rows_linear",
    few_rows_linear_ref,
    Backend("cpu", native_function("few_rows_linear", None, _fake), _refuse_cpu),
)
