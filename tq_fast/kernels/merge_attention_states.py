"""merge_attention_states in Triton: one launch, a program a tile of rows, each row read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import all_registers, device_of

# Elements of each output that a program holds at a time: 16 for each of its 128 threads.
_TILE = 2048
_MOST_COLUMNS = 256
_NUM_WARPS = 4


@triton.jit
def _clean(lse):
    """-inf for an empty state, whatever marks it: compiled maxima treat NaN differently."""
    return tl.where((lse == lse) & (lse < float("inf")), lse, float("-inf"))


@triton.jit
def _share(lse, peak, mass):
    """The weight of a state; 0 where both are empty."""
    return tl.where(lse == float("-inf"), 0.0, tl.exp(lse - peak) / mass)


@triton.jit(do_not_specialize=("num_rows",))
def _merge_attention_states_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    num_rows,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out `[N, size]`, lse `[N]`, all dense. Programs: [N / ROWS]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    a = _clean(tl.load(lse_a + row, mask=exists, other=float("-inf")))
    b = _clean(tl.load(lse_b + row, mask=exists, other=float("-inf")))
    # Finite always: two empty states would otherwise subtract infinities.
    peak = tl.maximum(tl.maximum(a, b), -3.4028234663852886e38)
    mass = tl.exp(a - peak) + tl.exp(b - peak)
    is_empty = (a == float("-inf")) & (b == float("-inf"))
    merged = tl.where(is_empty, float("-inf"), peak + tl.log(tl.where(is_empty, 1.0, mass)))
    tl.store(lse + row, merged, mask=exists)
    share_a, share_b = _share(a, peak, mass), _share(b, peak, mass)
    for first in range(0, size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at = row[:, None] * size + column[None, :]
        within = exists[:, None] & (column < size)[None, :]
        # A part of no weight is not read: it may hold NaN.
        part_a = tl.load(out_a + at, mask=within & (share_a > 0.0)[:, None], other=0.0)
        part_b = tl.load(out_b + at, mask=within & (share_b > 0.0)[:, None], other=0.0)
        mixed = share_a[:, None] * part_a.to(tl.float32) + share_b[:, None] * part_b.to(tl.float32)
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=within)


def merge_attention_states_triton(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The Triton kernel, of the two states flat."""
    size, num_rows = out_a.shape[-1], lse_a.numel()
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=lse_a.device)
    if num_rows == 0:
        return out, lse
    columns = min(triton.next_power_of_2(max(size, 1)), _MOST_COLUMNS)
    rows = _TILE // columns
    with device_of(out_a):
        _merge_attention_states_kernel[(triton.cdiv(num_rows, rows),)](
            out_a.contiguous(),
            lse_a.contiguous(),
            out_b.contiguous(),
            lse_b.contiguous(),
            out,
            lse,
            num_rows,
            size,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_NUM_WARPS,
            **all_registers(),
        )
    return out, lse
