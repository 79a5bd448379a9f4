"""The prefix of a tree in splits of fixed length: the kernel that makes them, and their merge.

A program attends from one tile of folded queries to one split and leaves (peak, mass, unnormalised
output) of each query; `merge_splits` takes these, in the order of the prefix, into the state of a
query. Between the two lies `partial_state` [splits, H_kv, folded, 2] and `partial_out`
[splits, H_kv, folded, d], fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tile import COUNTS, attend, empty_state, load_rows, skip_unseen, store_rows


@triton.jit
def _trees_of_tile(tree, stride_tree, row, unit, HAS_TREE: tl.constexpr):
    """(tree of each query, the first of them, the last) of the queries of these rows."""
    if HAS_TREE:
        own_tree = tl.load(tree + row * stride_tree).to(tl.int32)
        first_tree = tl.min(own_tree, axis=0)
        last_tree = tl.max(own_tree, axis=0)
    else:
        own_tree = tl.zeros(row.shape, tl.int32) + unit
        first_tree = unit
        last_tree = unit
    return own_tree, first_tree, last_tree


@triton.jit(do_not_specialize=COUNTS)
def _shared_prefix_attention_prefix_kernel(
    q, prefix_k, prefix_v, prefix_len, branch_len, tree, partial_state, partial_out,
    stride_qn, stride_qh, stride_qt,
    stride_kg, stride_kh, stride_kp,
    stride_vg, stride_vh, stride_vp,
    stride_prefix_len, stride_branch_len, stride_tree,
    scale, softcap,
    rows_per_unit, num_queries, num_prefix, num_folded, split_len, blocks, window,
    group, head_size,
    HAS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
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
    at = row * stride_qn + head * stride_qh + t.to(tl.int64) * stride_qt
    queries = load_rows(q, at, exists, head_size, SIZE)
    own_len = tl.load(branch_len + row * stride_branch_len).to(tl.int32)
    own_tree, first_tree, last_tree = _trees_of_tile(tree, stride_tree, row, unit, HAS_TREE)

    state = empty_state(QUERIES, SIZE)
    for g in range(first_tree, last_tree + 1):
        length = tl.load(prefix_len + g * stride_prefix_len).to(tl.int32)
        length = tl.minimum(length, num_prefix)
        begin = split * split_len
        end = tl.minimum(begin + split_len, length)
        is_ours = exists & (own_tree == g)
        if HAS_TREE:
            # Do not read a tree that has no rows in this tile.
            end = tl.where(tl.max(is_ours.to(tl.int32), axis=0) > 0, end, begin)
        first_seen = tl.zeros((QUERIES,), tl.int32)
        if HAS_WINDOW:
            first_seen = length + own_len - num_queries + t - window + 1
            begin = skip_unseen(begin, end, first_seen, is_ours)
        place = tl.zeros((), tl.int64) + g
        keys = prefix_k + place * stride_kg + kv_head * stride_kh
        values = prefix_v + place * stride_vg + kv_head * stride_vh
        source = (keys, values, stride_kp, stride_vp)
        seen = (first_seen, tl.zeros((QUERIES,), tl.int32) + (length - 1), is_ours)
        span, scoring = (begin, end), (scale, softcap)
        state = attend(
            queries,
            source,
            state,
            span,
            seen,
            scoring,
            head_size,
            HAS_SOFTCAP,
            HAS_TREE,
            KEYS,
            SIZE,
        )

    peak, mass, acc = state
    place = (split * tl.num_programs(1) + kv_head) * num_folded + row * per_row + folded % per_row
    tl.store(partial_state + place * 2, peak, mask=exists)
    tl.store(partial_state + place * 2 + 1, mass, mask=exists)
    store_rows(partial_out, place * head_size, acc, exists, head_size, SIZE)


@triton.jit
def merge_splits(
    partial_state,
    partial_out,
    place,
    stride_split,
    num_splits,
    exists,
    state,
    head_size,
    SIZE: tl.constexpr,
):
    """`state` after all splits, in the order of the prefix, whichever program came first."""
    peak, mass, acc = state
    for split in range(0, num_splits):
        at = place + split * stride_split
        part_peak = tl.load(partial_state + at * 2, mask=exists, other=float("-inf"))
        part_mass = tl.load(partial_state + at * 2 + 1, mask=exists, other=0.0)
        part = load_rows(partial_out, at * head_size, exists, head_size, SIZE)
        highest = tl.maximum(peak, part_peak)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2(peak - shift)
        share = tl.exp2(part_peak - shift)
        mass = mass * fade + part_mass * share
        acc = acc * fade[:, None] + part * share[:, None]
        peak = highest
    return peak, mass, acc


def split_length(num_queries: int) -> int:
    """Keys of one split, for rows of `num_queries` queries.

    The length depends on nothing else, so that a result never depends on what else runs. It is
    longer where a row has several queries, whose partial results take more memory.
    """
    return 256 if num_queries == 1 else 1024
