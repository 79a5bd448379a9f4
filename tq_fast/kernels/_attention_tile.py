"""One tile of queries over a range of keys, on tensor cores: the inner loop of attention.

The state of a query is (peak, mass, acc): the largest score so far, the sum of exp2(score - peak)
and the sum of exp2(score - peak) * value. Scores are in base 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._device import all_registers
from ._softcap import LN_2, LOG2_E, soften

# Sizes that follow the batch, the caches and the step: never specialised.
COUNTS = (
    "rows_per_unit",
    "num_queries",
    "num_prefix",
    "num_branch",
    "num_rows",
    "num_folded",
    "split_unit",
    "most_splits",
    "blocks",
    "window",
)


class Tiles(NamedTuple):
    """Sizes of the tiles of one kernel."""

    queries: int
    keys: int
    num_warps: int
    has_all_registers: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The options that a launch passes to the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": 2}
        return options | all_registers() if self.has_all_registers else options


def choose_tiles(queries: int, size: int, dtype: torch.dtype) -> Tiles:
    """Tiles for `queries` that share the keys of one key-value head.

    Chosen so that nothing is spilled on sm_80 to sm_100, with Triton 3.6 as with 3.9; products in
    fp32 run outside the tensor cores and take more registers. Tensor cores sum in an order that
    follows from the tile, so that in 16 bits the last bits follow from `queries`; fp32 has one
    tile.
    """
    if dtype == torch.float32:
        return Tiles(16, 16, 8 if size > 64 else 4, has_all_registers=True)
    if queries <= 16:
        return Tiles(16, 32, 4 if size > 128 else 2)
    if size > 128:
        return Tiles(32, 32, 8, has_all_registers=True)
    return Tiles(64, 32, 8, has_all_registers=True)


@triton.jit
def load_rows(start, offset, exists, head_size, SIZE: tl.constexpr):
    """The rows [Q, SIZE] at these offsets from `start`, 0 where there is none."""
    d = tl.arange(0, SIZE)
    mask = exists[:, None] & (d < head_size)[None, :]
    return tl.load(start + offset[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, offset, rows, exists, head_size, SIZE: tl.constexpr):
    """Write the rows [Q, SIZE] that exist to these offsets from `start`."""
    d = tl.arange(0, SIZE)
    mask = exists[:, None] & (d < head_size)[None, :]
    tl.store(start + offset[:, None] + d[None, :], rows.to(start.dtype.element_ty), mask=mask)


@triton.jit
def store_result(out, lse, at, place, peak, mass, acc, exists, head_size, SIZE: tl.constexpr):
    """The normalised output at the offsets `at`, and the natural lse at `place`."""
    # A mass of 0 means that the query saw no key. A NaN mass is not 0, so it stays visible.
    is_empty = mass == 0.0
    result = acc / tl.where(is_empty, 1.0, mass)[:, None]
    store_rows(out, at, result, exists, head_size, SIZE)
    whole = tl.where(is_empty, float("-inf"), (peak + tl.log2(mass)) * LN_2)
    tl.store(lse + place, whole, mask=exists)


@triton.jit
def empty_state(QUERIES: tl.constexpr, SIZE: tl.constexpr):
    """(peak, mass, acc) of queries that saw no key yet."""
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    return peak, mass, tl.zeros((QUERIES, SIZE), tl.float32)


@triton.jit
def skip_unseen(begin, end, first_seen, exists):
    """The first key of [begin, end) that one of the queries sees, by `first_seen` of each."""
    return tl.maximum(begin, tl.min(tl.where(exists, first_seen, end), axis=0))


@triton.jit
def attend(
    q,
    source,
    state,
    span,
    seen,
    scoring,
    head_size,
    HAS_SOFTCAP: tl.constexpr,
    IS_MIXED: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """(peak, mass, acc) of the queries `q` [Q, SIZE], `state` before, after the keys of a span.

    `source` is (keys, values, stride of keys, stride of values), `span` (begin, end) and `scoring`
    (scale, softcap). `seen` is (first_seen, last_seen, is_ours): query i sees the keys
    first_seen[i] .. last_seen[i]. Where IS_MIXED, a query that is not ours keeps its state. Tiles
    start at multiples of KEYS, wherever the first key is.
    """
    keys, values, stride_k, stride_v = source
    peak, mass, acc = state
    begin, end = span
    first_seen, last_seen, is_ours = seen
    scale, softcap = scoring
    d = tl.arange(0, SIZE)
    is_dim = d < head_size
    for first in range(begin // KEYS * KEYS, end, KEYS):
        key = first + tl.arange(0, KEYS)
        offset = key.to(tl.int64)
        # Keys that no query sees may be NaN, so they are never loaded.
        mask = ((key >= begin) & (key < end))[:, None] & is_dim[None, :]
        k = tl.load(keys + offset[:, None] * stride_k + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + offset[:, None] * stride_v + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = soften(scores, softcap) * LOG2_E
        is_seen = (key[None, :] >= first_seen[:, None]) & (key[None, :] <= last_seen[:, None])
        is_seen = is_seen & is_ours[:, None] & (key < end)[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        # A NaN score stays in the weights, so that the output shows it; maxima never see one.
        highest = tl.max(tl.where(scores == scores, scores, float("-inf")), axis=1)
        highest = tl.maximum(peak, highest)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(peak - shift)
        mass = mass * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        if IS_MIXED:
            # Select, since 0 times a value of another tree is NaN where the value is not finite.
            added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            acc += tl.where(is_ours[:, None], added, 0.0)
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        peak = highest
    return peak, mass, acc
