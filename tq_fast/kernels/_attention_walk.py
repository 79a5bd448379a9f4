"""Many queries a row: a program walks over prefix and branch itself, and leaves nothing in between.

A row has T queries of each of the heads that share a key-value head. Where they fill tiles, a tile
belongs to one row. Where they would leave an eighth of their tiles idle or more, tiles are cut from
the queries of all rows, one row after the other: a tile then meets the end of one row and the
beginning of the next, walks once over the prefix of the tree that they share, and over the branch
of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tile import (
    COUNTS,
    attend,
    empty_state,
    load_rows,
    skip_unseen,
    store_result,
)


def folds_rows(per_row: int, queries: int) -> bool:
    """Whether tiles of so many queries are cut from all rows, of `per_row` queries each."""
    places = triton.cdiv(per_row, queries) * queries
    return 8 * (places - per_row) >= places


@triton.jit
def _rows_of_tile(blocks, num_rows, per_row, FOLDS_ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """(first row, last row, row of each query, its place among the row's, whether it exists)."""
    program = tl.program_id(0)
    if FOLDS_ROWS:
        first = program * QUERIES
        folded = first + tl.arange(0, QUERIES)
        exists = folded < num_rows * per_row
        first_row = first // per_row
        last_row = tl.minimum((first + QUERIES - 1) // per_row, num_rows - 1)
        row = tl.minimum(folded // per_row, num_rows - 1)
        folded = folded % per_row
    else:
        folded = program % blocks * QUERIES + tl.arange(0, QUERIES)
        exists = folded < per_row
        first_row = program // blocks
        last_row = first_row
        row = tl.zeros((QUERIES,), tl.int32) + first_row
    return first_row.to(tl.int64), last_row.to(tl.int64), row.to(tl.int64), folded, exists


@triton.jit
def _tree_of(row, tree, stride_tree, rows_per_unit, HAS_TREE: tl.constexpr):
    """The tree of each of these rows."""
    if HAS_TREE:
        own_tree = tl.load(tree + row * stride_tree).to(tl.int32)
    else:
        own_tree = (row // rows_per_unit).to(tl.int32)
    return own_tree


@triton.jit(do_not_specialize=COUNTS)
def _shared_prefix_attention_walk_kernel(
    q, prefix_k, prefix_v, prefix_len, branch_k, branch_v, branch_len, tree, out, lse,
    stride_qn, stride_qh, stride_qt,
    stride_pkg, stride_pkh, stride_pkp,
    stride_pvg, stride_pvh, stride_pvp,
    stride_bkn, stride_bkh, stride_bks,
    stride_bvn, stride_bvh, stride_bvs,
    stride_on, stride_oh, stride_ot,
    stride_prefix_len, stride_branch_len, stride_tree,
    scale, softcap,
    rows_per_unit, num_queries, num_prefix, num_branch, num_rows, blocks, window,
    group, head_size,
    HAS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    FOLDS_ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One tile of queries over its prefixes and branches.

    Programs: [blocks, H_kv] where FOLDS_ROWS, else [N * blocks, H_kv].
    """
    kv_head = tl.program_id(1).to(tl.int64)
    first_row, last_row, row, folded, exists = _rows_of_tile(
        blocks, num_rows, group * num_queries, FOLDS_ROWS, QUERIES
    )
    head = kv_head * group + folded // num_queries
    t = folded % num_queries
    at = row * stride_qn + head * stride_qh + t.to(tl.int64) * stride_qt
    queries = load_rows(q, at, exists, head_size, SIZE)

    own_tree = _tree_of(row, tree, stride_tree, rows_per_unit, HAS_TREE)
    first_tree = _tree_of(first_row, tree, stride_tree, rows_per_unit, HAS_TREE)
    last_tree = _tree_of(last_row, tree, stride_tree, rows_per_unit, HAS_TREE)
    own_len = tl.load(branch_len + row * stride_branch_len).to(tl.int32)
    position = tl.minimum(own_len, num_branch) - num_queries + t

    state = empty_state(QUERIES, SIZE)
    scoring = (scale, softcap)
    first_seen = tl.zeros((QUERIES,), tl.int32)
    for g in range(first_tree, last_tree + 1):
        is_ours = exists & (own_tree == g)
        length = tl.load(prefix_len + g * stride_prefix_len).to(tl.int32)
        length = tl.minimum(length, num_prefix)
        # Do not read a tree that has no rows in this tile.
        length = tl.where(tl.max(is_ours.to(tl.int32), axis=0) > 0, length, 0)
        begin = 0
        if HAS_WINDOW:
            first_seen = length + position - window + 1
            begin = skip_unseen(begin, length, first_seen, is_ours)
        place = tl.zeros((), tl.int64) + g
        keys = prefix_k + place * stride_pkg + kv_head * stride_pkh
        values = prefix_v + place * stride_pvg + kv_head * stride_pvh
        source, span = (keys, values, stride_pkp, stride_pvp), (begin, length)
        seen = (first_seen, tl.zeros((QUERIES,), tl.int32) + (length - 1), is_ours)
        state = attend(
            queries, source, state, span, seen, scoring, head_size,
            HAS_SOFTCAP, FOLDS_ROWS, KEYS, SIZE,
        )  # fmt: skip

    for r in range(first_row, last_row + 1):
        is_ours = exists & (row == r)
        begin = 0
        # No query of this tile sees a key beyond the newest of their tokens.
        end = tl.max(tl.where(is_ours, position, -1), axis=0) + 1
        if HAS_WINDOW:
            first_seen = position - window + 1
            begin = skip_unseen(begin, end, first_seen, is_ours)
        keys = branch_k + r * stride_bkn + kv_head * stride_bkh
        values = branch_v + r * stride_bvn + kv_head * stride_bvh
        source, span = (keys, values, stride_bks, stride_bvs), (begin, end)
        seen = (first_seen, position, is_ours)
        state = attend(
            queries, source, state, span, seen, scoring, head_size,
            HAS_SOFTCAP, FOLDS_ROWS, KEYS, SIZE,
        )  # fmt: skip

    peak, mass, acc = state
    at = row * stride_on + head * stride_oh + t.to(tl.int64) * stride_ot
    place = (row * tl.num_programs(1) * group + head) * num_queries + t
    store_result(out, lse, at, place, peak, mass, acc, exists, head_size, SIZE)
