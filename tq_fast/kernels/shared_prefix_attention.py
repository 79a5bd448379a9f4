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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_splits import _shared_prefix_attention_prefix_kernel, merge_splits, split_length
from ._attention_tile import COUNTS, attend, choose_tiles
from ._device import device_of
from ._softcap import LN_2, LOG2_E


@triton.jit(do_not_specialize=COUNTS)
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
        peak, mass, acc = merge_splits(
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
        # No query of this tile sees a key beyond the newest of their tokens.
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

    # A mass of 0 means that the query saw no key. A NaN mass is not 0, so it stays visible.
    is_empty = mass == 0.0
    result = acc / tl.where(is_empty, 1.0, mass)[:, None]
    at = row * stride_on + head * stride_oh + t.to(tl.int64) * stride_ot
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    whole = tl.where(is_empty, float("-inf"), (peak + tl.log2(mass)) * LN_2)
    place = (row * tl.num_programs(1) * group + head) * num_queries + t
    tl.store(lse + place, whole, mask=exists)


# From this many queries of one row and key-value head on, a row fills tiles by itself.
_MANY_QUERIES = 64


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
            tiles = choose_tiles(64, common["SIZE"], q.dtype, folds=True)
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
                **tiles.options,
                **common,
            )
        tiles = choose_tiles(min(per_row, 64), common["SIZE"], q.dtype, folds=False)
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
            **tiles.options,
            **common,
        )
    return out, lse
