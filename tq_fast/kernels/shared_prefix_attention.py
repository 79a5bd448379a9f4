"""shared_prefix_attention in Triton: the prefix once for all rows of a tree, then each branch.

Decoding (few queries a row) takes two kernels. The first (`_attention_splits.py`) folds the queries
of all rows of a tree that read one key-value head into the rows of a tile, so that the tensor cores
see full tiles and a prefix tile is loaded once for all of them; a program takes one split of the
prefix and leaves (peak, mass, unnormalised output). The second, one program a row and key-value
head, attends to the row's branch and merges the splits in order.

With many queries a row (a prompt, a scored roll-out) one kernel (`_attention_walk.py`) walks over
prefix and branch, and nothing is left in between.

Scores are in base 2 inside: exp2 is one instruction. The lse that leaves is natural. The output
lies in memory as [N, T, H_q, d], as the layers that read it want it.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_splits import (
    Splits,
    _shared_prefix_attention_prefix_kernel,
    choose_splits,
    merge_splits,
    place_splits,
)
from ._attention_tile import (
    COUNTS,
    attend,
    choose_tiles,
    empty_state,
    load_rows,
    skip_unseen,
    store_result,
)
from ._attention_walk import _shared_prefix_attention_walk_kernel, folds_rows
from ._device import device_of
from ._softcap import LOG2_E


@triton.jit(do_not_specialize=COUNTS)
def _shared_prefix_attention_kernel(
    q, prefix_len, branch_k, branch_v, branch_len, tree,
    partial_state, partial_out, out, lse,
    stride_qn, stride_qh, stride_qt,
    stride_bkn, stride_bkh, stride_bks,
    stride_bvn, stride_bvh, stride_bvs,
    stride_on, stride_oh, stride_ot,
    stride_prefix_len, stride_branch_len, stride_tree,
    scale, softcap,
    rows_per_unit, num_queries, num_prefix, num_branch, num_folded, split_unit, most_splits,
    blocks, window,
    group, head_size,
    HAS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A row's queries over its branch, and over the partial results of its prefix.

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

    place = kv_head * num_folded + row * per_row + folded
    stride_split = tl.num_programs(1).to(tl.int64) * num_folded
    _, _, splits = place_splits(
        shared_len, window, num_queries, split_unit, most_splits, HAS_WINDOW
    )
    state = empty_state(QUERIES, SIZE)
    state = merge_splits(
        partial_state, partial_out, place, stride_split, splits, exists, state, head_size, SIZE
    )

    begin = 0
    first_seen = tl.zeros((QUERIES,), tl.int32)
    if HAS_WINDOW:
        first_seen = position - window + 1
        begin = skip_unseen(begin, own_len, first_seen, exists)
    keys = branch_k + row * stride_bkn + kv_head * stride_bkh
    values = branch_v + row * stride_bvn + kv_head * stride_bvh
    # No query of this tile sees a key beyond the newest of their tokens.
    end = tl.minimum(own_len, tl.max(tl.where(exists, position, -1), axis=0) + 1)
    source, span = (keys, values, stride_bks, stride_bvs), (begin, end)
    seen, scoring = (first_seen, position, exists), (scale, softcap)
    peak, mass, acc = attend(
        queries, source, state, span, seen, scoring, head_size, HAS_SOFTCAP, False, KEYS, SIZE
    )
    at = row * stride_on + head * stride_oh + t.to(tl.int64) * stride_ot
    place = (row * tl.num_programs(1) * group + head) * num_queries + t
    store_result(out, lse, at, place, peak, mass, acc, exists, head_size, SIZE)


# From this many queries of one row and key-value head on, a row fills tiles by itself.
_MANY_QUERIES = 64


class _Common(TypedDict):
    """The arguments by name that all kernels take."""

    scale: float
    softcap: float
    rows_per_unit: int
    num_queries: int
    num_prefix: int
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
    out = q.new_empty((rows, num_queries, num_heads, head_size)).transpose(1, 2)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    common: _Common = {
        "scale": scale if softcap else scale * LOG2_E.value,
        "softcap": softcap or 0.0,
        "rows_per_unit": rows // trees if tree is None else rows,
        "num_queries": num_queries,
        "num_prefix": num_prefix,
        "window": window or 0,
        "group": num_heads // num_kv_heads,
        "head_size": head_size,
        "HAS_TREE": tree is not None,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "SIZE": max(16, triton.next_power_of_2(head_size)),
    }
    prefix = (prefix_k, prefix_v, prefix_len)
    branch = (branch_k, branch_v, branch_len)
    with device_of(q):
        if common["group"] * num_queries >= _MANY_QUERIES:
            _launch_walk(q, prefix, branch, tree, (out, lse), common)
        else:
            _launch_decoding(q, prefix, branch, tree, (out, lse), common)
    return out, lse


_Keys = tuple[Tensor, Tensor, Tensor]


def _launch_walk(
    q: Tensor,
    prefix: _Keys,
    branch: _Keys,
    tree: Tensor | None,
    results: tuple[Tensor, Tensor],
    common: _Common,
) -> None:
    """Attend to prefixes and branches in one launch."""
    rows, num_kv_heads = q.shape[0], prefix[0].shape[1]
    per_row = common["group"] * common["num_queries"]
    tiles = choose_tiles(per_row, common["SIZE"], q.dtype)
    folds = folds_rows(per_row, tiles.queries)
    blocks = triton.cdiv(rows * per_row if folds else per_row, tiles.queries)
    _shared_prefix_attention_walk_kernel[(blocks if folds else rows * blocks, num_kv_heads)](
        q,
        *prefix,
        *branch,
        tree,
        *results,
        *q.stride()[:3],
        *prefix[0].stride()[:3],
        *prefix[1].stride()[:3],
        *branch[0].stride()[:3],
        *branch[1].stride()[:3],
        *results[0].stride()[:3],
        prefix[2].stride(0),
        branch[2].stride(0),
        0 if tree is None else tree.stride(0),
        num_branch=branch[0].shape[2],
        num_rows=rows,
        blocks=blocks,
        FOLDS_ROWS=folds,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        **tiles.options,
        **common,
    )


def _launch_decoding(
    q: Tensor,
    prefix: _Keys,
    branch: _Keys,
    tree: Tensor | None,
    results: tuple[Tensor, Tensor],
    common: _Common,
) -> None:
    """Attend to the splits of the prefixes, then to the branches, and merge."""
    num_kv_heads, num_prefix = prefix[0].shape[1:3]
    num_queries, window = common["num_queries"], common["window"] or None
    splits = choose_splits(num_queries, num_kv_heads)
    num_splits = splits.bound(num_prefix, num_queries, window)
    num_folded = q.shape[0] * common["group"] * num_queries
    parts = (num_splits, num_kv_heads, num_folded)
    partial_state = q.new_empty((*parts, 2), dtype=torch.float32)
    partial_out = q.new_empty((*parts, q.shape[-1]), dtype=torch.float32)
    partial = (partial_state, partial_out)
    if num_splits > 0:
        _launch_splits(q, prefix, branch[2], tree, partial, splits, common)
    _launch_rows(q, prefix[2], branch, tree, partial, results, splits, common)


def _launch_splits(
    q: Tensor,
    prefix: _Keys,
    branch_len: Tensor,
    tree: Tensor | None,
    partial: tuple[Tensor, Tensor],
    splits: Splits,
    common: _Common,
) -> None:
    """Leave the partial results of the prefix, split by split, in `partial`."""
    prefix_k, prefix_v, prefix_len = prefix
    num_splits, num_kv_heads, num_folded = partial[0].shape[:3]
    per_row = common["group"] * common["num_queries"]
    # Where a tree has few queries, larger tiles would be idle, or mix queries of several trees.
    tiles = choose_tiles(triton.cdiv(num_folded, prefix_k.shape[0]), common["SIZE"], q.dtype)
    blocks = triton.cdiv(common["rows_per_unit"] * per_row, tiles.queries)
    units = prefix_k.shape[0] if tree is None else 1
    _shared_prefix_attention_prefix_kernel[(units * blocks, num_kv_heads, num_splits)](
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
        num_folded=num_folded,
        split_unit=splits.unit,
        most_splits=splits.most,
        blocks=blocks,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        **tiles.options,
        **common,
    )


def _launch_rows(
    q: Tensor,
    prefix_len: Tensor,
    branch: _Keys,
    tree: Tensor | None,
    partial: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    splits: Splits,
    common: _Common,
) -> None:
    """Attend from each row to its branch, and merge the partial results of its prefix."""
    branch_k, branch_v, branch_len = branch
    num_kv_heads, num_folded = partial[0].shape[1:3]
    per_row = common["group"] * common["num_queries"]
    tiles = choose_tiles(per_row, common["SIZE"], q.dtype)
    blocks = triton.cdiv(per_row, tiles.queries)
    _shared_prefix_attention_kernel[(q.shape[0] * blocks, num_kv_heads)](
        q,
        prefix_len,
        *branch,
        tree,
        *partial,
        *results,
        *q.stride()[:3],
        *branch_k.stride()[:3],
        *branch_v.stride()[:3],
        *results[0].stride()[:3],
        prefix_len.stride(0),
        branch_len.stride(0),
        0 if tree is None else tree.stride(0),
        num_branch=branch_k.shape[2],
        num_folded=num_folded,
        split_unit=splits.unit,
        most_splits=splits.most,
        blocks=blocks,
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        **tiles.options,
        **common,
    )
