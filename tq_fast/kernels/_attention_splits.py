"""The prefix of a tree in splits: the kernel that attends to them, and their merge.

A program attends from one tile of folded queries to one split and leaves (peak, mass, unnormalised
output) of each query; `merge_splits` takes these, in the order of the prefix, into the state of a
query. Between the two lies `partial_state` [splits, H_kv, folded, 2] and `partial_out`
[splits, H_kv, folded, d], fp32.

The length of a tree's splits follows from the length of its own prefix, which the device reads, and
from shapes of the model: a longer prefix in the batch, and with it a larger buffer, changes no
result. Programs of the launch that have no split write nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._attention_tile import COUNTS, attend, empty_state, load_rows, skip_unseen, store_rows


class Splits(NamedTuple):
    """How prefixes are split: into at most `most` splits, each a multiple of `unit` keys."""

    unit: int
    most: int

    def bound(self, num_prefix: int, num_queries: int, window: int | None) -> int:
        """The largest number of splits that a prefix of up to `num_prefix` keys can have."""
        most_keys = num_prefix
        if window is not None:
            most_keys = min(num_prefix, window + num_queries + self.unit - 2)
        return min(self.most, triton.cdiv(most_keys, self.unit))


def choose_splits(num_queries: int, num_kv_heads: int) -> Splits:
    """The splits for rows of `num_queries` queries, which depend on shapes of the model only.

    While a row has one query, splits are short, because one tree with a short prompt gives few
    programs for the multiprocessors (132 on an H100). There are at most as many splits as the
    merge, which takes them one after the other, can afford. Programs, each with a split, for one
    tree of 10 rows, d = 128, in 16 bits:

    =============================  ============  ==============
    heads                          prefix 512    prefix 4,096
    =============================  ============  ==============
    32 (Llama 7B)                  256           512
    32 on 8 key-value heads (GQA)  64            256
    =============================  ============  ==============

    Splits of 256 keys whatever the prefix would give 64 and 512, and 16 and 128.
    Splits of several queries are longer, because their partial results take more memory.
    """
    if num_queries > 1:
        return Splits(unit=1024, most=16)
    return Splits(unit=64, most=16 if num_kv_heads >= 16 else 32)


@triton.jit
def place_splits(length, window, num_queries, unit, most, HAS_WINDOW: tl.constexpr):
    """(first key, keys of a split, number of splits) of a prefix of `length` keys.

    The first split begins where the window of the oldest of the `num_queries` queries can begin.
    """
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(length - window - num_queries + 1, 0) // unit * unit
    split_len = unit * tl.maximum(tl.cdiv(length - start, unit * most), 1)
    return start, split_len, tl.cdiv(length - start, split_len)


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
    rows_per_unit, num_queries, num_prefix, num_folded, split_unit, most_splits, blocks, window,
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
    own_splits = tl.zeros((QUERIES,), tl.int32)
    for g in range(first_tree, last_tree + 1):
        length = tl.load(prefix_len + g * stride_prefix_len).to(tl.int32)
        length = tl.minimum(length, num_prefix)
        start, split_len, num_splits = place_splits(
            length, window, num_queries, split_unit, most_splits, HAS_WINDOW
        )
        begin = start + split * split_len
        end = tl.minimum(begin + split_len, length)
        is_ours = exists & (own_tree == g)
        own_splits = tl.where(is_ours, num_splits, own_splits)
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
    has_split = exists & (split < own_splits)
    tl.store(partial_state + place * 2, peak, mask=has_split)
    tl.store(partial_state + place * 2 + 1, mass, mask=has_split)
    store_rows(partial_out, place * head_size, acc, has_split, head_size, SIZE)


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
