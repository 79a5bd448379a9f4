"""A decoder layer from the heads' output to the next residual stream.

    r = residual + attended Wo^T + bo
    h = norm_weight * r / sqrt(mean(r^2) + eps)
    y = r + (silu(h Wg^T + bg) * (h Wu^T + bu)) Wd^T + bd        silu(a) = a / (1 + exp(-a))

Every step is rounded to the dtype of residual, as the modules of transformers round it. Bytes: the
weights are read once; made for few rows, where that is nearly all there is to do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._dispatch import Backend, Op, native_function
from .few_rows_linear import few_rows_linear_ref
from .project_qkv import Linear, operands, rms_norm_ref


def finish_decoder_layer(
    attended: Tensor,
    residual: Tensor,
    o_linear: Linear,
    norm_weight: Tensor,
    gate_linear: Linear,
    up_linear: Linear,
    down_linear: Linear,
    *,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """Output projection, residual, RMS norm, gated MLP with SiLU, residual.

    The second half of a decoder layer of Llama (arXiv 2302.13971).

    Args:
        attended: `[N, T, A]`, the output of attention, floating point.
        residual: `[N, T, D]`, the dtype of `attended`, as all that follows.
        o_linear: weight `[D, A]` and bias `[D]` or None; with an fp32 scale `[D]` as a third part
            the weight is int8, as in `few_rows_linear`.
        norm_weight: `[D]`.
        gate_linear: weight `[I, D]` and bias `[I]` or None.
        up_linear: as `gate_linear`.
        down_linear: weight `[D, I]` and bias `[D]` or None.
        eps: added to the mean square.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        `[N, T, D]`, contiguous.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    op = "finish_decoder_layer"
    _checks.require_tensors(op, attended=attended, residual=residual, norm_weight=norm_weight)
    _checks.require_number(op, "eps", eps, 0.0)
    _checks.require_dim(op, "attended", attended, 3, "[N, T, A]")
    _checks.require_float(op, "attended", attended)
    _checks.require_dim(op, "residual", residual, 3, "[N, T, D]")
    shape = (*attended.shape[:2], residual.shape[2])
    _checks.require_shape(op, "residual", residual, shape, "[N, T, D] with the rows of attended")
    size = residual.shape[2]
    _checks.require_shape(op, "norm_weight", norm_weight, (size,), "[D]")
    tensors = {"residual": residual, "norm_weight": norm_weight}
    tensors |= _checks.require_linear(op, "o", o_linear, attended.shape[2], size)
    tensors |= _checks.require_linear(op, "gate", gate_linear, size)
    inner = gate_linear[0].shape[0]
    tensors |= _checks.require_linear(op, "up", up_linear, size, inner)
    tensors |= _checks.require_linear(op, "down", down_linear, inner, size)
    _checks.require_tensors(op, attended=attended, **tensors)
    _checks.require_dtypes_of_layer(op, tensors, attended.dtype)
    _checks.refuse_grad(op, attended=attended, **tensors)
    linears = gate_linear, up_linear, down_linear
    return _OP(backend, attended, residual, o_linear, norm_weight, *linears, eps=eps)


def finish_decoder_layer_ref(
    attended: Tensor,
    residual: Tensor,
    o_linear: Linear,
    norm_weight: Tensor,
    gate_linear: Linear,
    up_linear: Linear,
    down_linear: Linear,
    *,
    eps: float,
) -> Tensor:
    """The reference of `finish_decoder_layer`: plain PyTorch, rounded between steps."""
    residual = residual + few_rows_linear_ref(attended, *o_linear)
    normed = rms_norm_ref(residual, norm_weight, eps)
    gate = torch.nn.functional.silu(few_rows_linear_ref(normed, *gate_linear))
    inner = gate * few_rows_linear_ref(normed, *up_linear)
    return residual + few_rows_linear_ref(inner, *down_linear)


def finish_decoder_layer_cpu(
    attended: Tensor,
    residual: Tensor,
    o_linear: Linear,
    norm_weight: Tensor,
    gate_linear: Linear,
    up_linear: Linear,
    down_linear: Linear,
    *,
    eps: float,
) -> Tensor:
    """The C++ kernel, with the arguments of the reference."""
    gated = (part for linear in (gate_linear, up_linear, down_linear) for part in operands(linear))
    return torch.ops.tq_fast.finish_decoder_layer.default(
        attended, residual, *operands(o_linear), norm_weight, eps, *gated
    )


def _fake(attended: Tensor, residual: Tensor, *parameters: object) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def _refuse_cpu(attended: Tensor, *args: object, **parameters: object) -> str | None:
    return _checks.refuse_float64(attended=attended)


_OP = Op(
    "finish_decoder_layer",
    finish_decoder_layer_ref,
    Backend(
        "cpu",
        native_function("finish_decoder_layer", finish_decoder_layer_cpu, _fake),
        _refuse_cpu,
    ),
)
