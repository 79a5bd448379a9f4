"""linear_trajectory_logprob in Triton: a tiled product whose tiles leave three numbers a row.

The first kernel multiplies one tile of hidden states with one tile of the vocabulary on tensor
cores and leaves each row's (peak, sum of exp(x - peak)) over that tile; the tile that holds a
row's token also leaves its logit, from the same accumulator. Logits never leave the registers.
The second kernel, one program a trajectory, merges the tiles in order and sums in fp64.

Rows go through in chunks, so that what lies between the kernels stays below 32 MB. Tiles have
fixed sizes and a row's products do not see its neighbours: chunks change no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import all_registers, device_of
from ._softcap import soften

_ROWS = 128
_VOCAB = 128
# Tiles of rows that share a tile of weight while it is in the L2 cache.
_ROW_TILES = 16
_PARTIAL_BYTES = 32 * 2**20
# The finaliser's tile: tokens by vocabulary tiles.
_TOKENS = 16
_TILES = 64

_COUNTS = ("first_row", "num_rows", "max_length", "num_row_tiles", "num_tiles")


@triton.jit
def _choose_tile(num_row_tiles, num_tiles, ROW_TILES: tl.constexpr):
    """(tile of rows, tile of the vocabulary) of this program, ROW_TILES tiles of rows at a time."""
    band = tl.program_id(0) // (ROW_TILES * num_tiles)
    within_band = tl.program_id(0) % (ROW_TILES * num_tiles)
    height = tl.minimum(num_row_tiles - band * ROW_TILES, ROW_TILES)
    return band * ROW_TILES + within_band % height, within_band // height


@triton.jit
def _add_products(
    acc,
    states,
    weights,
    exists,
    is_token,
    stride_hd,
    stride_wd,
    num_dims,
    IS_EVEN: tl.constexpr,
    DIMS: tl.constexpr,
):
    """acc [ROWS, VOCAB] plus the products of the rows at `states` and those at `weights`."""
    dim = tl.arange(0, DIMS)
    states = states[:, None] + dim[None, :] * stride_hd
    weights = weights[None, :] + dim[:, None] * stride_wd
    for first in range(0, num_dims, DIMS):
        mask_h = exists[:, None]
        mask_w = is_token[None, :]
        if not IS_EVEN:
            mask_h = mask_h & (first + dim < num_dims)[None, :]
            mask_w = mask_w & (first + dim < num_dims)[:, None]
        h = tl.load(states, mask=mask_h, other=0.0)
        w = tl.load(weights, mask=mask_w, other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        states += DIMS * stride_hd
        weights += DIMS * stride_wd
    return acc


@triton.jit
def _reduce_tile(logits):
    """(peak, sum of exp(x - peak)) of each row of a tile; (-inf, 0) if all are -inf."""
    peak = tl.max(logits, axis=1)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.sum(tl.exp(logits - shift[:, None]), axis=1)


@triton.jit(do_not_specialize=_COUNTS)
def _linear_trajectory_logprob_kernel(
    hidden,
    weight,
    bias,
    tokens,
    lengths,
    peaks,
    sums,
    targets,
    stride_hn,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_b,
    stride_tn,
    stride_tt,
    stride_length,
    scale,
    softcap,
    first_row,
    num_rows,
    max_length,
    num_row_tiles,
    num_tiles,
    vocab_size,
    num_dims,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DIMS: tl.constexpr,
):
    """peaks, sums [num_rows, num_tiles] and targets [num_rows] of one chunk of rows.

    Programs: [num_row_tiles * num_tiles], ROW_TILES tiles of rows at a time over the vocabulary.
    """
    row_tile, tile = _choose_tile(num_row_tiles, num_tiles, ROW_TILES)
    local = row_tile * ROWS + tl.arange(0, ROWS)
    exists = local < num_rows
    row = first_row.to(tl.int64) + local
    n = row // max_length
    t = row % max_length
    length = tl.load(lengths + n * stride_length, mask=exists, other=0)
    exists = exists & (t < length)
    if tl.max(exists.to(tl.int32), axis=0) > 0:
        column = tile * VOCAB + tl.arange(0, VOCAB)
        is_token = column < vocab_size
        acc = _add_products(
            tl.zeros((ROWS, VOCAB), tl.float32),
            hidden + n * stride_hn + t * stride_ht,
            weight + column.to(tl.int64) * stride_wv,
            exists,
            is_token,
            stride_hd,
            stride_wd,
            num_dims,
            IS_EVEN,
            DIMS,
        )
        if HAS_BIAS:
            b = tl.load(bias + column.to(tl.int64) * stride_b, mask=is_token, other=0.0)
            acc += b.to(tl.float32)[None, :]
        acc = acc * scale
        if HAS_SOFTCAP:
            acc = soften(acc, softcap)
        # Padding and NaN are no logits; compiled and interpreted maxima treat NaN differently.
        acc = tl.where(is_token[None, :] & (acc == acc), acc, float("-inf"))
        peak, total = _reduce_tile(acc)
        place = local.to(tl.int64) * num_tiles + tile
        tl.store(peaks + place, peak, mask=exists)
        tl.store(sums + place, total, mask=exists)

        token = tl.load(tokens + n * stride_tn + t * stride_tt, mask=exists, other=-1)
        is_target = token[:, None] == column[None, :]
        chosen = tl.max(tl.where(is_target, acc, float("-inf")), axis=1)
        is_here = (token >= tile * VOCAB) & (token < tl.minimum((tile + 1) * VOCAB, vocab_size))
        tl.store(targets + row, chosen, mask=exists & is_here)


@triton.jit(do_not_specialize=_COUNTS)
def _linear_trajectory_logprob_row_kernel(
    tokens,
    lengths,
    peaks,
    sums,
    targets,
    terms,
    stride_tn,
    stride_tt,
    stride_length,
    first_row,
    num_rows,
    max_length,
    num_tiles,
    vocab_size,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """terms[row] = log p(token) of one chunk of rows, 0 beyond a length.

    Programs: [cdiv(num_rows, TOKENS)].
    """
    local = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = local < num_rows
    row = first_row.to(tl.int64) + local
    n = row // max_length
    t = row % max_length
    within = exists & (t < tl.load(lengths + n * stride_length, mask=exists, other=0))
    peak = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)[None, :]
        mask = within[:, None] & (tile < num_tiles)
        place = local.to(tl.int64)[:, None] * num_tiles + tile
        tile_peaks = tl.load(peaks + place, mask=mask, other=float("-inf"))
        tile_sums = tl.load(sums + place, mask=mask, other=0.0)
        highest = tl.maximum(peak, tl.max(tile_peaks, axis=1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(peak - shift)
        total += tl.sum(tile_sums * tl.exp(tile_peaks - shift[:, None]), axis=1)
        peak = highest
    token = tl.load(tokens + n * stride_tn + t * stride_tt, mask=within, other=0)
    is_known = (token >= 0) & (token < vocab_size)
    chosen = tl.load(targets + row, mask=within & is_known, other=0.0)
    # A peak of +inf is the lse. A row without a valid logit has peak -inf, and -inf - -inf is NaN.
    log_total = tl.where(peak == float("inf"), 0.0, tl.log(total))
    term = chosen - peak - log_total
    term = tl.where(term > 0.0, 0.0, term)
    term = tl.where(is_known, term, float("nan"))
    tl.store(terms + row, tl.where(within, term, 0.0), mask=exists)


@triton.jit(do_not_specialize=_COUNTS)
def _linear_trajectory_logprob_sum_kernel(terms, out, max_length, TOKENS: tl.constexpr):
    """out[n] = the sum of terms[n, :]. Programs: [N]."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    for first in range(0, max_length, TOKENS):
        t = first + tl.arange(0, TOKENS)
        term = tl.load(terms + n * max_length + t, mask=t < max_length, other=0.0)
        total += tl.sum(term.to(tl.float64), axis=0)
    tl.store(out + n, total.to(tl.float32))


def linear_trajectory_logprob_triton(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The Triton kernels, with the arguments of `linear_trajectory_logprob_ref`."""
    count, length, num_dims = hidden.shape
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    out = hidden.new_empty((count,), dtype=torch.float32)
    if count == 0:
        return out
    is_wide = hidden.dtype == torch.float32
    rows_of_tile, vocab_of_tile, dims = (64, 64, 16) if is_wide else (_ROWS, _VOCAB, 64)
    num_tiles = triton.cdiv(vocab_size, vocab_of_tile)
    chunk = max(_PARTIAL_BYTES // (8 * num_tiles) // rows_of_tile, 1) * rows_of_tile
    chunk = min(chunk, count * length)
    scratch = hidden.new_empty((2, chunk, num_tiles), dtype=torch.float32)
    targets, terms = hidden.new_empty((2, count, length), dtype=torch.float32)
    token_strides = (*tokens.stride(), lengths.stride(0))
    with device_of(hidden):
        for first_row in range(0, count * length, max(chunk, 1)):
            num_rows = min(chunk, count * length - first_row)
            num_row_tiles = triton.cdiv(num_rows, rows_of_tile)
            _linear_trajectory_logprob_kernel[(num_row_tiles * num_tiles,)](
                hidden,
                weight,
                bias,
                tokens,
                lengths,
                *scratch,
                targets,
                *hidden.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                *token_strides,
                float(scale),
                softcap or 0.0,
                first_row,
                num_rows,
                length,
                num_row_tiles,
                num_tiles,
                vocab_size,
                num_dims,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap is not None,
                IS_EVEN=num_dims % dims == 0,
                ROW_TILES=_ROW_TILES,
                ROWS=rows_of_tile,
                VOCAB=vocab_of_tile,
                DIMS=dims,
                num_warps=4 if is_wide else 8,
                num_stages=2 if is_wide else 3,
                **({} if is_wide else all_registers()),
            )
            _linear_trajectory_logprob_row_kernel[(triton.cdiv(num_rows, _TOKENS),)](
                tokens,
                lengths,
                *scratch,
                targets,
                terms,
                *token_strides,
                first_row,
                num_rows,
                length,
                num_tiles,
                vocab_size,
                TOKENS=_TOKENS,
                TILES=_TILES,
                num_warps=4,
                **all_registers(),
            )
        _linear_trajectory_logprob_sum_kernel[(count,)](terms, out, length, TOKENS=128, num_warps=1)
    return out
