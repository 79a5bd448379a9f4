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

from typing import TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_splits import _shared_prefix_attention_prefix_kernel, merge_splits, split_length
from ._attention_tile import (
    COUNTS,
    attend,
    choose_tiles,
    empty_state,
    load_rows,
    skip_unseen,
    store_rows,
)
from ._device import device_of
from ._softcap import LN_2, LOG2_E


@triton.jit(do_not_specialize=COUNTS)
def _shared_prefix_attention_kernel(
    q, prefix_k, prefix_v, prefix_len, branch_k, branch_v, branch_len, tree,
    partial_state, partial_out, out, lse,
    stride_qn, stride_qh, stride_qt,
    stride_pkg, stride_pkh, stride_pkp,
    stride_pvg, stride_pvh, stride_pvp,
    stride_bkn, stride_bkh, stride_bks,
    stride_bvn, stride_bvh, stride_bvs,
    stride_on, stride_oh, stride_ot,
    stride_prefix_len, stride_branch_len, stride_tree,
    scale, softcap,
    rows_per_unit, num_queries, num_prefix, num_branch, num_folded, split_len, blocks, window,
    group, head_size,
    HAS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WALKS_PREFIX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A row's queries over its branch, and over its prefix or the partial results of it.

    Programs: [N * blocks, H_kv].
    """
    kv_head = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    folded = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    per_row = group * num_queries
    exists = folded < per_row
    head = kv_head * group + folded // num_queries
    t = folded % num_queries
    at = row * stride_qn + head * stride_qh + t.to(tl.int64) * stride_qt
    queries = load_rows(q, at, exists, head_size, SIZE)

    own_tree = row // rows_per_unit
    if HAS_TREE:
        own_tree = tl.load(tree + row * stride_tree).to(tl.int64)
    own_len = tl.load(branch_len + row * stride_branch_len).to(tl.int32)
    own_len = tl.minimum(own_len, num_branch)
    shared_len = tl.load(prefix_len + own_tree * stride_prefix_len).to(tl.int32)
    shared_len = tl.minimum(shared_len, num_prefix)
    position = own_len - num_queries + t

    state = empty_state(QUERIES, SIZE)
    scoring = (scale, softcap)
    first_seen = tl.zeros((QUERIES,), tl.int32)
    if WALKS_PREFIX:
        begin = 0
        if HAS_WINDOW:
            first_seen = shared_len + position - window + 1
            begin = skip_unseen(begin, shared_len, first_seen, exists)
        keys = prefix_k + own_tree * stride_pkg + kv_head * stride_pkh
        values = prefix_v + own_tree * stride_pvg + kv_head * stride_pvh
        source, span = (keys, values, stride_pkp, stride_pvp), (begin, shared_len)
        seen = (first_seen, tl.zeros((QUERIES,), tl.int32) + (shared_len - 1), exists)
        state = attend(
            queries, source, state, span, seen, scoring, head_size, HAS_SOFTCAP, False, KEYS, SIZE
        )
    else:
        place = kv_head * num_folded + row * per_row + folded
        stride_split = tl.num_programs(1).to(tl.int64) * num_folded
        splits = tl.cdiv(shared_len, split_len)
        state = merge_splits(
            partial_state, partial_out, place, stride_split, splits, exists, state, head_size, SIZE
        )

    begin = 0
    if HAS_WINDOW:
        first_seen = position - window + 1
        begin = skip_unseen(begin, own_len, first_seen, exists)
    keys = branch_k + row * stride_bkn + kv_head * stride_bkh
    values = branch_v + row * stride_bvn + kv_head * stride_bvh
    # No query of this tile sees a key beyond the newest of their tokens.
    end = tl.minimum(own_len, tl.max(tl.where(exists, position, -1), axis=0) + 1)
    source, span = (keys, values, stride_bks, stride_bvs), (begin, end)
    seen = (first_seen, position, exists)
    peak, mass, acc = attend(
        queries, source, state, span, seen, scoring, head_size, HAS_SOFTCAP, False, KEYS, SIZE
    )
    at = row * stride_on + head * stride_oh + t.to(tl.int64) * stride_ot
    place = (row * tl.num_programs(1) * group + head) * num_queries + t
    _store_result(out, lse, at, place, peak, mass, acc, exists, head_size, SIZE)


@triton.jit
def _store_result(out, lse, at, place, peak, mass, acc, exists, head_size, SIZE: tl.constexpr):
    """The normalised output at the offsets `at`, and the natural lse at `place`."""
    # A mass of 0 means that the query saw no key. A NaN mass is not 0, so it stays visible.
    is_empty = mass == 0.0
    result = acc / tl.where(is_empty, 1.0, mass)[:, None]
    store_rows(out, at, result, exists, head_size, SIZE)
    whole = tl.where(is_empty, float("-inf"), (peak + tl.log2(mass)) * LN_2)
    tl.store(lse + place, whole, mask=exists)


# From this many queries of one row and key-value head on, a row fills tiles by itself.
_MANY_QUERIES = 64


class _Common(TypedDict):
    """The arguments by name that both kernels take."""

    scale: float
    softcap: float
    rows_per_unit: int
    num_queries: int
    num_prefix: int
    num_folded: int
    split_len: int
    window: int
    group: int
    head_size: int
    HAS_TREE: bool
    HAS_WINDOW: bool
    HAS_SOFTCAP: bool
    SIZE: int


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
    split_len = split_length(num_queries)
    num_splits = 0 if walks_prefix else triton.cdiv(num_prefix, split_len)
    common: _Common = {
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
    partial = (partial_state, partial_out)
    prefix = (prefix_k, prefix_v, prefix_len)
    branch = (branch_k, branch_v, branch_len)
    with device_of(q):
        if num_splits > 0:
            _launch_splits(q, prefix, branch_len, tree, partial, num_splits, common)
        _launch_rows(q, prefix, branch, tree, partial, (out, lse), walks_prefix, common)
    return out, lse


_Keys = tuple[Tensor, Tensor, Tensor]


def _launch_splits(
    q: Tensor,
    prefix: _Keys,
    branch_len: Tensor,
    tree: Tensor | None,
    partial: tuple[Tensor, Tensor],
    num_splits: int,
    common: _Common,
) -> None:
    """Leave the partial results of the prefix, split by split, in `partial`."""
    prefix_k, prefix_v, prefix_len = prefix
    tiles = choose_tiles(64, common["SIZE"], q.dtype, folds=True)
    per_row = common["group"] * common["num_queries"]
    blocks = triton.cdiv(common["rows_per_unit"] * per_row, tiles.queries)
    units = prefix_k.shape[0] if tree is None else 1
    _shared_prefix_attention_prefix_kernel[(units * blocks, prefix_k.shape[1], num_splits)](
        q,
        *prefix,
        branch_len,
        tree,
        *partial,
        *q.stride()[:3],
        *prefix_k.stride()[:3],
        *prefix_v.stride()[:3],
        prefix_len.stride(0),
        branch_len.stride(0),
        0 if tree is None else tree.stride(0),
        blocks=blocks,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        **tiles.options,
        **common,
    )


def _launch_rows(
    q: Tensor,
    prefix: _Keys,
    branch: _Keys,
    tree: Tensor | None,
    partial: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    walks_prefix: bool,
    common: _Common,
) -> None:
    """Attend from each row to its branch, and to its prefix or the partial results of it."""
    prefix_k, prefix_v, prefix_len = prefix
    branch_k, branch_v, branch_len = branch
    per_row = common["group"] * common["num_queries"]
    tiles = choose_tiles(min(per_row, 64), common["SIZE"], q.dtype, folds=False)
    blocks = triton.cdiv(per_row, tiles.queries)
    _shared_prefix_attention_kernel[(q.shape[0] * blocks, prefix_k.shape[1])](
        q,
        *prefix,
        *branch,
        tree,
        *partial,
        *results,
        *q.stride()[:3],
        *prefix_k.stride()[:3],
        *prefix_v.stride()[:3],
        *branch_k.stride()[:3],
        *branch_v.stride()[:3],
        *results[0].stride()[:3],
        prefix_len.stride(0),
        branch_len.stride(0),
        0 if tree is None else tree.stride(0),
        num_branch=branch_k.shape[2],
        blocks=blocks,
        WALKS_PREFIX=walks_prefix,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        **tiles.options,
        **common,
    )
