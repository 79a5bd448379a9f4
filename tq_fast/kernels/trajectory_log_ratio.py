"""trajectory_log_ratio in Triton: log-sum-exps of fixed splits, then one ordered sum a row.

The first kernel reads every logit once: a program takes one split of one token's vocabulary, of
both models, whole in registers, and leaves (peak, sum of exp(x - peak)) of each. The second, one
program a row, merges the splits in order, gathers the tokens' logits and sums the terms in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_of

# Logits of one model that a program holds in registers: 32 for each of its 128 threads.
_SPLIT = 4096
_NUM_WARPS = 4
# The finaliser's tile: tokens by splits.
_TOKENS = 16
_SPLITS = 32

_COUNTS = ("max_length", "num_splits")


@triton.jit
def _clean(logits):
    """fp32, NaN as -inf: compiled and interpreted maxima treat NaN differently."""
    values = logits.to(tl.float32)
    return tl.where(values == values, values, float("-inf"))


@triton.jit
def _reduce_split(logits, stride_v, start, vocab_size, SPLIT: tl.constexpr):
    """(peak, sum of exp(x - peak)) of `logits[start : start + SPLIT]`; (-inf, 0) if all -inf."""
    ids = start + tl.arange(0, SPLIT)
    values = tl.load(
        logits + ids.to(tl.int64) * stride_v, mask=ids < vocab_size, other=float("-inf")
    )
    values = _clean(values)
    peak = tl.max(values, axis=0)
    # A split of -inf only takes 0 as its peak: exp(-inf - 0) is 0, but -inf - -inf would be NaN.
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.sum(tl.exp(values - shift), axis=0)


@triton.jit(do_not_specialize=_COUNTS)
def _trajectory_log_ratio_kernel(
    logits_p,
    logits_q,
    lengths,
    partials,
    stride_pn,
    stride_pt,
    stride_pv,
    stride_qn,
    stride_qt,
    stride_qv,
    stride_length,
    max_length,
    num_splits,
    vocab_size,
    SPLIT: tl.constexpr,
):
    """partials[row, t, split] = (peak_p, sum_p, peak_q, sum_q) over one split of the vocabulary.

    Programs: [N * T * num_splits], the splits of a token side by side.
    """
    program = tl.program_id(0)
    split = program % num_splits
    token = program // num_splits
    row = (token // max_length).to(tl.int64)
    t = token % max_length
    if t < tl.load(lengths + row * stride_length):
        start = split * SPLIT
        at_p = logits_p + row * stride_pn + t.to(tl.int64) * stride_pt
        at_q = logits_q + row * stride_qn + t.to(tl.int64) * stride_qt
        peak_p, sum_p = _reduce_split(at_p, stride_pv, start, vocab_size, SPLIT)
        peak_q, sum_q = _reduce_split(at_q, stride_qv, start, vocab_size, SPLIT)
        out = partials + program.to(tl.int64) * 4
        tl.store(out, peak_p)
        tl.store(out + 1, sum_p)
        tl.store(out + 2, peak_q)
        tl.store(out + 3, sum_q)


@triton.jit
def _merge_splits(partials, num_splits, within, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """(peak, sum) `[TOKENS]` over all splits; `partials` points at the first split of each."""
    peak = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[None, :]
        mask = within[:, None] & (split < num_splits)
        at = partials[:, None] + split * 4
        peaks = tl.load(at, mask=mask, other=float("-inf"))
        sums = tl.load(at + 1, mask=mask, other=0.0)
        highest = tl.maximum(peak, tl.max(peaks, axis=1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(peak - shift)
        total += tl.sum(sums * tl.exp(peaks - shift[:, None]), axis=1)
        peak = highest
    return peak, total


@triton.jit
def _token_logprob(chosen, peak, total):
    """log_softmax of the chosen logits `[TOKENS]`, -inf where the logit is, whatever the rest."""
    chosen = _clean(chosen)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    logprob = chosen - shift - tl.log(total)
    return tl.where(chosen == float("-inf"), float("-inf"), logprob)


@triton.jit(do_not_specialize=_COUNTS)
def _trajectory_log_ratio_sum_kernel(
    logits_p,
    logits_q,
    tokens,
    lengths,
    partials,
    out,
    stride_pn,
    stride_pt,
    stride_pv,
    stride_qn,
    stride_qt,
    stride_qv,
    stride_tn,
    stride_tt,
    stride_length,
    max_length,
    num_splits,
    vocab_size,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """out[row] = sum over t of log p - log q. Programs: [N]."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row * stride_length).to(tl.int64), max_length).to(
        tl.int32
    )
    ratio = tl.zeros((), tl.float64)
    for first in range(0, length, TOKENS):
        t = (first + tl.arange(0, TOKENS)).to(tl.int64)
        within = t < length
        token = tl.load(tokens + row * stride_tn + t * stride_tt, mask=within, other=0)
        token = token.to(tl.int64)
        known = (token >= 0) & (token < vocab_size)
        at = within & known
        chosen_p = tl.load(
            logits_p + row * stride_pn + t * stride_pt + token * stride_pv, mask=at, other=0.0
        )
        chosen_q = tl.load(
            logits_q + row * stride_qn + t * stride_qt + token * stride_qv, mask=at, other=0.0
        )
        own = partials + (row * max_length + t) * num_splits * 4
        peak_p, sum_p = _merge_splits(own, num_splits, within, TOKENS, SPLITS)
        peak_q, sum_q = _merge_splits(own + 2, num_splits, within, TOKENS, SPLITS)
        term = _token_logprob(chosen_p, peak_p, sum_p) - _token_logprob(chosen_q, peak_q, sum_q)
        term = tl.where(known, term, float("nan"))
        ratio += tl.sum(tl.where(within, term, 0.0).to(tl.float64), axis=0)
    tl.store(out + row, ratio.to(tl.float32))


def trajectory_log_ratio_triton(
    logits_p: Tensor,
    logits_q: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The Triton kernels, with the arguments of `trajectory_log_ratio_ref`."""
    rows, length, width = logits_p.shape
    vocab_size = width if vocab_size is None else vocab_size
    num_splits = triton.cdiv(vocab_size, _SPLIT)
    out = logits_p.new_empty((rows,), dtype=torch.float32)
    if rows == 0:
        return out
    partials = logits_p.new_empty((rows, length, num_splits, 4), dtype=torch.float32)
    strides = (*logits_p.stride(), *logits_q.stride())
    with device_of(logits_p):
        if length > 0:
            _trajectory_log_ratio_kernel[(rows * length * num_splits,)](
                logits_p,
                logits_q,
                lengths,
                partials,
                *strides,
                lengths.stride(0),
                length,
                num_splits,
                vocab_size,
                SPLIT=_SPLIT,
                num_warps=_NUM_WARPS,
            )
        _trajectory_log_ratio_sum_kernel[(rows,)](
            logits_p,
            logits_q,
            tokens,
            lengths,
            partials,
            out,
            *strides,
            *tokens.stride(),
            lengths.stride(0),
            length,
            num_splits,
            vocab_size,
            TOKENS=_TOKENS,
            SPLITS=_SPLITS,
            num_warps=_NUM_WARPS,
        )
    return out
