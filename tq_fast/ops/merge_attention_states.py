"""Join two attention results over disjoint sets of keys into the result over both.

    lse = log(exp(lse_a) + exp(lse_b))
    out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

An lse of -inf means that a state saw no key; +inf and NaN are read the same way. Two such states
give (0, -inf). Bytes: both states read and one written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import _checks
from ._dispatch import Op


class AttentionState(NamedTuple):
    """`out` `[..., d]` and `lse` fp32 `[...]`, the log-sum-exp of the scores."""

    out: Tensor
    lse: Tensor


def merge_attention_states(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, backend: str | None = None
) -> AttentionState:
    """Attention over the keys of `a` and of `b` together, from attention over each.

    The merge step of split attention (Dao et al., FlashDecoding; arXiv 2205.14135 section 3).

    Args:
        a: `(out [..., d], lse fp32 [...])`.
        b: the same shapes and dtypes over other keys.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        AttentionState, `out` in the dtype of `a`'s. The output of an empty state is not read,
        so it may hold NaN.

    Raises:
        InvalidArgument: shapes or dtypes that do not fit, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    (out_a, lse_a), (out_b, lse_b) = _two("a", a), _two("b", b)
    _check(out_a, lse_a, out_b, lse_b)
    return AttentionState._make(_OP(backend, out_a, lse_a, out_b, lse_b))


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_attention_states"
    _checks.require_tensors(op, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.dim() == 0:
        raise InvalidArgument(f"{op}: out_a has shape [], expected at least 1 axis, [..., d]")
    _checks.require_float(op, "out_a", out_a)
    _checks.require_shape(op, "lse_a", lse_a, tuple(out_a.shape[:-1]), "out_a without [d]")
    _checks.require_shape(op, "out_b", out_b, tuple(out_a.shape), "the shape of out_a")
    _checks.require_dtype(op, "out_b", out_b, out_a.dtype)
    _checks.require_shape(op, "lse_b", lse_b, tuple(lse_a.shape), "the shape of lse_a")
    _checks.require_dtype(op, "lse_a", lse_a, torch.float32)
    _checks.require_dtype(op, "lse_b", lse_b, torch.float32)
    _checks.refuse_grad(op, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def _two(name: str, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(state, tuple) or len(state) != 2:
        raise InvalidArgument(
            f"merge_attention_states: {name} is {_checks.describe(state)}, expected (out, lse)"
        )
    return state


def merge_attention_states_ref(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
) -> AttentionState:
    """The reference of `merge_attention_states`: plain PyTorch, fp32 inside."""
    return _merge_ref(*a, *b)


def _merge_ref(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> AttentionState:
    """The reference, with the four tensors by position, as an `Op` hands them on."""
    lse_a = torch.where(lse_a.isfinite(), lse_a, -torch.inf)
    lse_b = torch.where(lse_b.isfinite(), lse_b, -torch.inf)
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse == -torch.inf, 0.0, lse)
    share_a = (lse_a - shift).exp().unsqueeze(-1)
    share_b = (lse_b - shift).exp().unsqueeze(-1)
    # A share of 0 drops an output whatever it holds, NaN included.
    part_a = torch.where(share_a == 0, 0.0, share_a * out_a.to(torch.float32))
    part_b = torch.where(share_b == 0, 0.0, share_b * out_b.to(torch.float32))
    return AttentionState((part_a + part_b).to(out_a.dtype), lse)


# PyTorch serves on every device: no kernel was faster where it mattered, since nothing that decodes
# merges whole tensors.
_OP = Op("merge_attention_states", _merge_ref)
