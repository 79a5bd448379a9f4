"""Queries, keys and values of a decoder layer, from the residual stream to rotated heads.

    h = norm_weight * x / sqrt(mean(x^2) + eps)
    q, k, v = h Wq^T + bq, h Wk^T + bk, h Wv^T + bv, as heads of size d
    q, k = q cos + half(q) sin, k cos + half(k) sin          half(a) = (-a_high, a_low)

Every step is rounded to the dtype of x, as the modules of transformers round it. Bytes: the weights
are read once; made for few rows, where that is nearly all there is to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._dispatch import Backend, Op, native_function
from .few_rows_linear import few_rows_linear_ref

# Weight and bias of a linear layer; with a third part, int8 weights and the scale of each output.
Linear = tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor | None]


class QueriesKeysValues(NamedTuple):
    """`q` `[N, T, H_q, d]`, `k` and `v` `[N, T, H_kv, d]`."""

    q: Tensor
    k: Tensor
    v: Tensor


def project_qkv(
    x: Tensor,
    norm_weight: Tensor,
    q_linear: Linear,
    k_linear: Linear,
    v_linear: Linear,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    backend: str | None = None,
) -> QueriesKeysValues:
    """RMS norm, three linear layers, and rotary positions on the first two.

    The first half of a decoder layer of Llama (arXiv 2302.13971), positions as in arXiv 2104.09864.

    Args:
        x: `[N, T, D]`, floating point.
        norm_weight: `[D]`, the dtype of `x`, as all that follows.
        q_linear: weight `[H_q d, D]` and bias `[H_q d]` or None; with an fp32 scale `[H_q d]` as a
            third part the weight is int8, as in `few_rows_linear`.
        k_linear: weight `[H_kv d, D]` and bias.
        v_linear: as `k_linear`.
        cos: `[N, T, d]` or `[1, T, d]`.
        sin: the shape of `cos`.
        eps: added to the mean square.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    op = "project_qkv"
    _checks.require_tensors(op, x=x, norm_weight=norm_weight, cos=cos, sin=sin)
    _checks.require_number(op, "eps", eps, 0.0)
    _checks.require_dim(op, "x", x, 3, "[N, T, D]")
    _checks.require_float(op, "x", x)
    num_rows, length, size = x.shape
    _checks.require_shape(op, "norm_weight", norm_weight, (size,), "[D]")
    _checks.require_dim(op, "cos", cos, 3, "[N, T, d]")
    angles = (1 if cos.shape[0] == 1 else num_rows, length, cos.shape[2])
    _checks.require_shape(op, "cos", cos, angles, "[N, T, d]")
    _checks.require_shape(op, "sin", sin, angles, "the shape of cos")
    tensors = {"norm_weight": norm_weight, "cos": cos, "sin": sin}
    for name, linear in (("q", q_linear), ("k", k_linear), ("v", v_linear)):
        tensors |= _checks.require_linear(op, name, linear, size)
    _checks.require_tensors(op, x=x, **tensors)
    _checks.require_dtypes_of_layer(op, tensors, x.dtype)
    _checks.require_heads(op, "q_weight", q_linear[0], cos.shape[2])
    _checks.require_heads(op, "k_weight", k_linear[0], cos.shape[2])
    _checks.require_shape(op, "v_weight", v_linear[0], tuple(k_linear[0].shape), "that of k_weight")
    _checks.refuse_grad(op, x=x, **tensors)
    result = _OP(backend, x, norm_weight, q_linear, k_linear, v_linear, cos, sin, eps=eps)
    return QueriesKeysValues(*result)


def project_qkv_ref(
    x: Tensor,
    norm_weight: Tensor,
    q_linear: Linear,
    k_linear: Linear,
    v_linear: Linear,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
) -> QueriesKeysValues:
    """The reference of `project_qkv`: plain PyTorch, rounded to the dtype of x between steps."""
    normed = rms_norm_ref(x, norm_weight, eps)
    heads, size = x.shape[:2], cos.shape[2]
    q, k, v = (
        few_rows_linear_ref(normed, *linear).view(*heads, linear[0].shape[0] // size, size)
        for linear in (q_linear, k_linear, v_linear)
    )
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return QueriesKeysValues(q * cos + _half(q) * sin, k * cos + _half(k) * sin, v)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`: fp32 inside, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def operands(linear: Linear) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and scale of a linear layer, as the schemas take them."""
    return linear if len(linear) == 3 else (*linear, None)


def project_qkv_cpu(
    x: Tensor,
    norm_weight: Tensor,
    q_linear: Linear,
    k_linear: Linear,
    v_linear: Linear,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel, with the arguments of the reference."""
    return torch.ops.tq_fast.project_qkv.default(
        x, norm_weight, eps, *operands(q_linear), *operands(k_linear), *operands(v_linear), cos, sin
    )


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    q_scale: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    k_scale: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    v_scale: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    size = cos.shape[2]
    heads = q_weight.shape[0] // size, k_weight.shape[0] // size, k_weight.shape[0] // size
    q, k, v = (x.new_empty((x.shape[0], x.shape[1], count, size)) for count in heads)
    return q, k, v


def _refuse_cpu(x: Tensor, *args: object, **parameters: object) -> str | None:
    return _checks.refuse_float64(x=x)


_OP = Op(
    "project_qkv",
    project_qkv_ref,
    Backend("cpu", native_function("project_qkv", project_qkv_cpu, _fake), _refuse_cpu),
)
