"""shared_prefix_attention in Triton: the prefix once for all rows of a tree, then each branch.

Decoding (few queries a row) takes two kernels. The first folds the queries of all rows of a tree
that read one key-value head into the rows of a tile, so that the tensor cores see full tiles and a
prefix tile is loaded once for all of them; a program takes one split of the prefix, of fixed
length, and leaves (peak, mass, unnormalised output). The second, one program a row and key-value
head, attends to the row's branch and merges the splits in order.

With many queries a row (a prompt, a scored roll-out) a row alone fills tiles: the second kernel
then walks over prefix and branch itself, and nothing is left in between.

Scores are in base 2 inside: exp2 is one instruction. The lse that leaves is natural.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tile import attend
from ._device import device_of
from ._softcap import LOG2_E

_LN_2 = tl.constexpr(math.log(2.0))

# Sizes that follow the batch, the caches and the step: never specialised.
_COUNTS = ("rows_per_unit", "num_queries", "num_prefix", "num_folded", "split_len", "blocks")
_COUNTS += ("window", "num_branch")


@triton.jit(do_not_specialize=_COUNTS)
def _shared_prefix_attention_prefix_kernel(
    q,
    prefix_k,
    prefix_v,
    prefix_len,
    branch_len,
    tree,
    partial_state,
    partial_out,
    stride_qn,
    stride_qh,
    stride_qt,
    stride_kg,
    stride_kh,
    stride_kp,
    stride_vg,
    stride_vh,
    stride_vp,
    stride_prefix_len,
    stride_branch_len,
    stride_tree,
    scale,
    softcap,
    rows_per_unit,
    num_queries,
    num_prefix,
    num_folded,
    split_len,
    blocks,
    window,
    group,
    head_size,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One tile of folded queries over one split of the prefix of its trees.

    Programs: [units * blocks, H_kv, splits]. A unit is a tree, or with `tree` all rows at once,
    whose tiles then walk over the few trees that they meet. Folded query: (row, head, token).
    """
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    unit = tl.program_id(0) // blocks
    folded = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    per_row = group * num_queries
    exists = folded < rows_per_unit * per_row
    row = unit * rows_per_unit + tl.minimum(folded // per_row, rows_per_unit - 1)
    row = row.to(tl.int64)
    head = kv_head * group + folded // num_queries % group
    t = folded % num_queries
    d = tl.arange(0, SIZE)
    at = row * stride_qn + head * stride_qh + t.to(tl.int64) * stride_qt
    mask = exists[:, None] & (d < head_size)[None, :]
    queries = tl.load(q + at[:, None] + d[None, :], mask=mask, other=0.0)
    own_len = tl.load(branch_len + row * stride_branch_len).to(tl.int32)

    if HAS_TREE:
        own_tree = tl.load(tree + row * stride_tree).to(tl.int32)
        first_tree = tl.min(own_tree, axis=0)
        last_tree = tl.max(own_tree, axis=0)
    else:
        own_tree = tl.zeros((QUERIES,), tl.int32) + unit
        first_tree = unit
        last_tree = unit

    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, SIZE), tl.float32)
    for g in range(first_tree, last_tree + 1):
        length = tl.load(prefix_len + g * stride_prefix_len).to(tl.int32)
        length = tl.minimum(length, num_prefix)
        begin = split * split_len
        end = tl.minimum(begin + split_len, length)
        is_ours = exists & (own_tree == g)
        if HAS_TREE:
            # A tree without rows here is not read.
            end = tl.where(tl.max(is_ours.to(tl.int32), axis=0) > 0, end, begin)
        first_seen = tl.zeros((QUERIES,), tl.int32)
        if HAS_WINDOW:
            first_seen = length + own_len - num_queries + t - window + 1
            begin = tl.maximum(begin, tl.min(tl.where(is_ours, first_seen, end), axis=0))
        place = tl.zeros((), tl.int64) + g
        peak, mass, acc = attend(
            queries,
            prefix_k + place * stride_kg + kv_head * stride_kh,
            prefix_v + place * stride_vg + kv_head * stride_vh,
            peak,
            mass,
            acc,
            begin,
            end,
            stride_kp,
            stride_vp,
            first_seen,
            tl.zeros((QUERIES,), tl.int32) + (length - 1),
            is_ours,
            scale,
            softcap,
            head_size,
            HAS_SOFTCAP,
            HAS_TREE,
            KEYS,
            SIZE,
        )

    place = (split * tl.num_programs(1) + kv_head) * num_folded + row * per_row + folded % per_row
    tl.store(partial_state + place * 2, peak, mask=exists)
    tl.store(partial_state + place * 2 + 1, mass, mask=exists)
    tl.store(partial_out + place[:, None] * head_size + d[None, :], acc, mask=mask)


@triton.jit
def _merge_splits(
    partial_state,
    partial_out,
    place,
    stride_split,
    num_splits,
    exists,
    peak,
    mass,
    acc,
    head_size,
    SIZE: tl.constexpr,
):
    """The state after all splits, in the order of the prefix, whichever program came first."""
    d = tl.arange(0, SIZE)
    mask = exists[:, None] & (d < head_size)[None, :]
    for split in range(0, num_splits):
        at = place + split * stride_split
        part_peak = tl.load(partial_state + at * 2, mask=exists, other=float("-inf"))
        part_mass = tl.load(partial_state + at * 2 + 1, mask=exists, other=0.0)
        part = tl.load(partial_out + at[:, None] * head_size + d[None, :], mask=mask, other=0.0)
        highest = tl.maximum(peak, part_peak)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2(peak - shift)
        share = tl.exp2(part_peak - shift)
        mass = mass * fade + part_mass * share
        acc = acc * fade[:, None] + part * share[:, None]
        peak = highest
    return peak, mass, acc


@triton.jit(do_not_specialize=_COUNTS)
def _shared_prefix_attention_kernel(
    q,
    prefix_k,
    prefix_v,
    prefix_len,
    branch_k,
    branch_v,
    branch_len,
    tree,
    partial_state,
    partial_out,
    out,
    lse,
    stride_qn,
    stride_qh,
    stride_qt,
    stride_pkg,
    stride_pkh,
    stride_pkp,
    stride_pvg,
    stride_pvh,
    stride_pvp,
    stride_bkn,
    stride_bkh,
    stride_bks,
    stride_bvn,
    stride_bvh,
    stride_bvs,
    stride_on,
    stride_oh,
    stride_ot,
    stride_prefix_len,
    stride_branch_len,
    stride_tree,
    scale,
    softcap,
    rows_per_unit,
    num_queries,
    num_prefix,
    num_branch,
    num_folded,
    split_len,
    blocks,
    window,
    group,
    head_size,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WALKS_PREFIX: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A row's queries over its branch, and over its prefix or the partial results of it.

    Programs: [N * blocks, H_kv].
    """
    kv_head = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    folded = block * QUERIES + tl.arange(0, QUERIES)
    per_row = group * num_queries
    exists = folded < per_row
    head = kv_head * group + folded // num_queries
    t = folded % num_queries
    d = tl.arange(0, SIZE)
    mask = exists[:, None] & (d < head_size)[None, :]
    at = row * stride_qn + head * stride_qh + t.to(tl.int64) * stride_qt
    queries = tl.load(q + at[:, None] + d[None, :], mask=mask, other=0.0)

    own_tree = row // rows_per_unit
    if HAS_TREE:
        own_tree = tl.load(tree + row * stride_tree).to(tl.int64)
    own_len = tl.load(branch_len + row * stride_branch_len).to(tl.int32)
    own_len = tl.minimum(own_len, num_branch)
    shared_len = tl.load(prefix_len + own_tree * stride_prefix_len).to(tl.int32)
    shared_len = tl.minimum(shared_len, num_prefix)
    position = own_len - num_queries + t

    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, SIZE), tl.float32)
    first_seen = tl.zeros((QUERIES,), tl.int32)
    if WALKS_PREFIX:
        begin = 0
        if HAS_WINDOW:
            first_seen = shared_len + position - window + 1
            begin = tl.maximum(tl.min(tl.where(exists, first_seen, shared_len), axis=0), 0)
        peak, mass, acc = attend(
            queries,
            prefix_k + own_tree * stride_pkg + kv_head * stride_pkh,
            prefix_v + own_tree * stride_pvg + kv_head * stride_pvh,
            peak,
            mass,
            acc,
            begin,
            shared_len,
            stride_pkp,
            stride_pvp,
            first_seen,
            tl.zeros((QUERIES,), tl.int32) + (shared_len - 1),
            exists,
            scale,
            softcap,
            head_size,
            HAS_SOFTCAP,
            False,
            KEYS,
            SIZE,
        )
    else:
        peak, mass, acc = _merge_splits(
            partial_state,
            partial_out,
            kv_head * num_folded + row * per_row + folded,
            tl.num_programs(1).to(tl.int64) * num_folded,
            tl.cdiv(shared_len, split_len),
            exists,
            peak,
            mass,
            acc,
            head_size,
            SIZE,
        )

    begin = 0
    if HAS_WINDOW:
        first_seen = position - window + 1
        begin = tl.maximum(tl.min(tl.where(exists, first_seen, own_len), axis=0), 0)
    peak, mass, acc = attend(
        queries,
        branch_k + row * stride_bkn + kv_head * stride_bkh,
        branch_v + row * stride_bvn + kv_head * stride_bvh,
        peak,
        mass,
        acc,
        begin,
        # Nothing beyond the newest token of this tile's queries is seen.
        tl.minimum(own_len, tl.max(tl.where(exists, position, -1), axis=0) + 1),
        stride_bks,
        stride_bvs,
        first_seen,
        position,
        exists,
        scale,
        softcap,
        head_size,
        HAS_SOFTCAP,
        False,
        KEYS,
        SIZE,
    )

    # A mass of 0 is a query that saw no key; NaN is neither 0 nor hidden.
    is_empty = mass == 0.0
    result = acc / tl.where(is_empty, 1.0, mass)[:, None]
    at = row * stride_on + head * stride_oh + t.to(tl.int64) * stride_ot
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    whole = tl.where(is_empty, float("-inf"), (peak + tl.log2(mass)) * _LN_2)
    place = (row * tl.num_programs(1) * group + head) * num_queries + t
    tl.store(lse + place, whole, mask=exists)


# Keys of one program of the prefix kernel. A constant, so that a result never depends on what
# else runs; longer where a row has several queries, whose partial results take more memory.
_SPLIT_OF_ONE_QUERY = 256
_SPLIT_OF_SEVERAL = 1024
# Queries of one row and key-value head from which a row fills tiles by itself.
_MANY_QUERIES = 64
_NUM_STAGES = 2


class _Tiles(NamedTuple):
    """Sizes of the tiles of one kernel, by head size and dtype only."""

    queries: int
    keys: int
    num_warps: int


def _tiles(queries: int, size: int, dtype: torch.dtype, folds: bool) -> _Tiles:
    """Tiles for `queries` of one key-value head, with `folds` those of many rows.

    Chosen so that nothing is spilled on sm_80 to sm_100; products in fp32 run outside the tensor
    cores and take more registers.
    """
    if dtype == torch.float32:
        few = queries <= 16 or size > 64
        return _Tiles(16 if few else 32, 16 if size > 64 else 32, 8 if folds and size > 128 else 4)
    if queries <= 16:
        return _Tiles(16, 32, 4 if size > 128 else 2)
    return _Tiles(64, 16 if size > 128 else 64, 8 if size > 64 else 4)


def shared_prefix_attention_triton(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    tree: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernels, with the arguments of `shared_prefix_attention_ref`."""
    rows, num_heads, num_queries, head_size = q.shape
    trees, num_kv_heads, num_prefix, _ = prefix_k.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    per_row = num_heads // num_kv_heads * num_queries
    walks_prefix = per_row >= _MANY_QUERIES or num_prefix == 0
    split_len = _SPLIT_OF_ONE_QUERY if num_queries == 1 else _SPLIT_OF_SEVERAL
    num_splits = 0 if walks_prefix else triton.cdiv(num_prefix, split_len)
    common = {
        "scale": scale if softcap else scale * LOG2_E.value,
        "softcap": softcap or 0.0,
        "rows_per_unit": rows // trees if tree is None else rows,
        "num_queries": num_queries,
        "num_prefix": num_prefix,
        "num_folded": rows * per_row,
        "split_len": split_len,
        "window": window or 0,
        "group": num_heads // num_kv_heads,
        "head_size": head_size,
        "HAS_TREE": tree is not None,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "SIZE": max(16, triton.next_power_of_2(head_size)),
    }
    parts = (num_splits, num_kv_heads, rows * per_row)
    partial_state = q.new_empty((*parts, 2), dtype=torch.float32)
    partial_out = q.new_empty((*parts, head_size), dtype=torch.float32)
    lengths = (prefix_len.stride(0), branch_len.stride(0), 0 if tree is None else tree.stride(0))
    with device_of(q):
        if num_splits > 0:
            tiles = _tiles(64, common["SIZE"], q.dtype, folds=True)
            blocks = triton.cdiv(common["rows_per_unit"] * per_row, tiles.queries)
            units = trees if tree is None else 1
            _shared_prefix_attention_prefix_kernel[(units * blocks, num_kv_heads, num_splits)](
                q,
                prefix_k,
                prefix_v,
                prefix_len,
                branch_len,
                tree,
                partial_state,
                partial_out,
                *q.stride()[:3],
                *prefix_k.stride()[:3],
                *prefix_v.stride()[:3],
                *lengths,
                blocks=blocks,
                QUERIES=tiles.queries,
                KEYS=tiles.keys,
                num_warps=tiles.num_warps,
                num_stages=_NUM_STAGES,
                **common,
            )
        tiles = _tiles(min(per_row, 64), common["SIZE"], q.dtype, folds=False)
        blocks = triton.cdiv(per_row, tiles.queries)
        _shared_prefix_attention_kernel[(rows * blocks, num_kv_heads)](
            q,
            prefix_k,
            prefix_v,
            prefix_len,
            branch_k,
            branch_v,
            branch_len,
            tree,
            partial_state,
            partial_out,
            out,
            lse,
            *q.stride()[:3],
            *prefix_k.stride()[:3],
            *prefix_v.stride()[:3],
            *branch_k.stride()[:3],
            *branch_v.stride()[:3],
            *out.stride()[:3],
            *lengths,
            num_branch=branch_k.shape[2],
            blocks=blocks,
            WALKS_PREFIX=walks_prefix,
            QUERIES=tiles.queries,
            KEYS=tiles.keys,
            num_warps=tiles.num_warps,
            num_stages=_NUM_STAGES,
            **common,
        )
    return out, lse
