"""value_sample_tokens in Triton: reductions of fixed splits, then one ordered merge and draw a row.

In the first kernel a program takes one split of the vocabulary for a tile of rows: their product
with the embeddings of the split, on tensor cores where both are of 16 bits, and beside it the
logits. It leaves the peak and the sum of the prior, the peak and the sum of the reweighted law, and
the sum that its divergence is made of. The second kernel, one program a row, merges the splits in
order in fp64, finds the split that the row's uniform falls into, computes its few sums again and
draws.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_of

# A program's tile: rows by tokens. The rows do not follow the batch: nothing is compiled again for
# another number of them.
_ROWS = 16
_TOKENS = 128
# Columns of directions and embeddings that are multiplied at once: more of 32 bits would spill.
_MOST_RANK = 32
_MOST_WIDE_RANK = 16
_LEAST_RANK = 16
# The finaliser's tile of splits, and its columns: it multiplies without tensor cores.
_SPLITS = 512
_ROW_RANK = 16
_NUM_WARPS = 4
# peak and sum of the prior; peak, sum and moment of the law; how many values are not finite.
_FIELDS = 6

_COUNTS = ("rows", "rank", "num_splits", "num_tiles")
_NO_SPLIT = tl.constexpr(2**30)
# The purpose ROLLOUT of philox.py, in the high word of the seed.
_PURPOSE = tl.constexpr(1 << 32)
_HALF_SPACING = tl.constexpr(2.0**-54)
_SPACING = tl.constexpr(2.0**-53)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _clean(values):
    """fp32, NaN as -inf: compiled and interpreted maxima treat NaN differently."""
    values = values.to(tl.float32)
    return tl.where(values == values, values, float("-inf"))


@triton.jit
def _reference(peak):
    """What exponentials refer to: a set of -inf only takes 0, since -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _inverse_temperature(temperature):
    """1 / temperature, at most the largest float; 1 for an arg max."""
    is_arg_max = temperature == 0.0
    return tl.minimum(1.0 / tl.where(is_arg_max, 1.0, temperature), _LARGEST)


@triton.jit(do_not_specialize=_COUNTS)
def _value_sample_tokens_kernel(
    logits,
    directions,
    embeddings,
    alphas,
    alpha,
    temperatures,
    temperature,
    partials,
    stride_ln,
    stride_lv,
    stride_dn,
    stride_dr,
    stride_ev,
    stride_er,
    stride_alpha,
    stride_temperature,
    rows,
    rank,
    num_splits,
    num_tiles,
    vocab_size,
    WIDENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """partials[row, field, split], six numbers of one split of each row's vocabulary.

    Programs: [num_splits * num_tiles], the tiles of rows of a split side by side.
    """
    program = tl.program_id(0)
    split = program // num_tiles
    row = ((program % num_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row < rows
    ids = (split * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_token = ids < vocab_size
    products = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, rank, RANK):
        column = (first + tl.arange(0, RANK)).to(tl.int64)
        is_column = column < rank
        left = tl.load(
            directions + row[:, None] * stride_dn + column[None, :] * stride_dr,
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        right = tl.load(
            embeddings + ids[None, :] * stride_ev + column[:, None] * stride_er,
            mask=is_token[None, :] & is_column[:, None],
            other=0.0,
        )
        if WIDENS:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
    if alphas is not None:
        alpha = tl.load(alphas + row * stride_alpha, mask=is_row, other=1.0).to(tl.float32)[:, None]
    if temperatures is not None:
        temperature = tl.load(temperatures + row * stride_temperature, mask=is_row, other=1.0)
        temperature = temperature.to(tl.float32)[:, None]
    q = products / alpha
    prior = tl.load(
        logits + row[:, None] * stride_ln + ids[None, :] * stride_lv,
        mask=is_row[:, None] & is_token[None, :],
        other=float("-inf"),
    )
    prior = _clean(prior)
    guided = _clean(prior + q)
    faults = (prior > float("-inf")) & ~(tl.abs(q) < float("inf"))

    prior_peak = tl.max(prior, axis=1)
    guided_peak = tl.max(guided, axis=1)
    apart = prior - _reference(prior_peak)[:, None]
    heated = (guided - _reference(guided_peak)[:, None]) * _inverse_temperature(temperature)
    masses = tl.exp(heated)
    terms = tl.where(masses > 0.0, masses * (heated - apart), 0.0)
    out = partials + row * FIELDS * num_splits + split
    tl.store(out, prior_peak, mask=is_row)
    tl.store(out + num_splits, tl.sum(tl.exp(apart), axis=1), mask=is_row)
    tl.store(out + 2 * num_splits, guided_peak, mask=is_row)
    tl.store(out + 3 * num_splits, tl.sum(masses, axis=1), mask=is_row)
    tl.store(out + 4 * num_splits, tl.sum(terms, axis=1), mask=is_row)
    tl.store(out + 5 * num_splits, tl.sum(faults.to(tl.float32), axis=1), mask=is_row)


@triton.jit
def _uniform(seed, key, step):
    """The float64 uniform of philox.uniform(seed, ROLLOUT, key, step); all are int64."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    steps = (step & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox((seed ^ _PURPOSE).to(tl.uint64), low * 0, steps, low, high)
    mantissa = (second.to(tl.int64) << 21) | (first.to(tl.int64) >> 11)
    return tl.minimum(mantissa.to(tl.float64) * _SPACING + _HALF_SPACING, _BELOW_ONE)


@triton.jit
def _load_split_masses(own, split, num_splits, guided_peak, inverse):
    """fp64 masses of the splits, relative to the peak of the row."""
    mask = split < num_splits
    peaks = tl.load(own + 2 * num_splits + split, mask=mask, other=float("-inf"))
    sums = tl.load(own + 3 * num_splits + split, mask=mask, other=0.0)
    shares = tl.exp((peaks - guided_peak) * inverse)
    return tl.where(shares > 0.0, shares, 0.0).to(tl.float64) * sums.to(tl.float64)


@triton.jit
def _merge_peaks(own, num_splits, SPLITS: tl.constexpr):
    """(peak of the prior, peak of the law, number of faults) of a row."""
    prior_peak = tl.full((), float("-inf"), tl.float32)
    guided_peak = tl.full((), float("-inf"), tl.float32)
    faults = tl.zeros((), tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = split < num_splits
        peaks = tl.load(own + split, mask=mask, other=float("-inf"))
        prior_peak = tl.maximum(prior_peak, tl.max(peaks, axis=0))
        peaks = tl.load(own + 2 * num_splits + split, mask=mask, other=float("-inf"))
        guided_peak = tl.maximum(guided_peak, tl.max(peaks, axis=0))
        faults += tl.sum(tl.load(own + 5 * num_splits + split, mask=mask, other=0.0), axis=0)
    return prior_peak, guided_peak, faults


@triton.jit
def _merge_sums(own, num_splits, prior_peak, guided_peak, inverse, SPLITS: tl.constexpr):
    """(total of the prior, total of the law, its moment) of a row, in fp64."""
    prior_total = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    moment = tl.zeros((), tl.float64)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = split < num_splits
        prior_peaks = tl.load(own + split, mask=mask, other=float("-inf"))
        prior_sums = tl.load(own + num_splits + split, mask=mask, other=0.0)
        peaks = tl.load(own + 2 * num_splits + split, mask=mask, other=float("-inf"))
        moments = tl.load(own + 4 * num_splits + split, mask=mask, other=0.0)
        prior_total += tl.sum((prior_sums * tl.exp(prior_peaks - prior_peak)).to(tl.float64), 0)
        masses = _load_split_masses(own, split, num_splits, guided_peak, inverse)
        total += tl.sum(masses, axis=0)
        # The differences of a split are relative to its own peaks.
        raised = (peaks - guided_peak) * inverse
        terms = masses * (raised - (prior_peaks - prior_peak)).to(tl.float64)
        terms += (tl.exp(raised) * moments).to(tl.float64)
        moment += tl.sum(tl.where(masses > 0.0, terms, 0.0), axis=0)
    return prior_total, total, moment


@triton.jit
def _choose_split(own, num_splits, guided_peak, inverse, target, is_arg_max, SPLITS: tl.constexpr):
    """(the split to draw from, the mass of those before it)."""
    chosen = tl.full((), _NO_SPLIT, tl.int32)
    last = tl.zeros((), tl.int32)
    running = tl.zeros((), tl.float64)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        masses = _load_split_masses(own, split, num_splits, guided_peak, inverse)
        mask = split < num_splits
        peaks = tl.load(own + 2 * num_splits + split, mask=mask, other=float("-inf"))
        is_past = running + tl.cumsum(masses, axis=0) > target
        is_found = tl.where(is_arg_max, peaks == guided_peak, is_past & (masses > 0.0))
        chosen = tl.minimum(chosen, tl.min(tl.where(is_found, split, _NO_SPLIT), axis=0))
        last = tl.maximum(last, tl.max(tl.where(masses > 0.0, split, 0), axis=0))
        running += tl.sum(masses, axis=0)
    # Rounding can lift the target to the total itself: then it is the last split with mass.
    chosen = tl.where(chosen == _NO_SPLIT, last, chosen)
    before = tl.zeros((), tl.float64)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        masses = _load_split_masses(own, split, num_splits, guided_peak, inverse)
        before += tl.sum(tl.where(split < chosen, masses, 0.0), axis=0)
    return chosen, before


@triton.jit(do_not_specialize=("step", "seed", "rank", "num_splits"))
def _value_sample_tokens_row_kernel(
    logits,
    directions,
    embeddings,
    keys,
    alphas,
    alpha,
    temperatures,
    temperature,
    step_tensor,
    step,
    seed_tensor,
    seed,
    partials,
    out_ids,
    out_priors,
    out_guided,
    out_kl,
    out_valid,
    stride_ln,
    stride_lv,
    stride_dn,
    stride_dr,
    stride_ev,
    stride_er,
    stride_key,
    stride_alpha,
    stride_temperature,
    rank,
    num_splits,
    vocab_size,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One token of one row, and what is reported of it. Programs: [N]."""
    row = tl.program_id(0).to(tl.int64)
    if alphas is not None:
        alpha = tl.load(alphas + row * stride_alpha).to(tl.float32)
    if temperatures is not None:
        temperature = tl.load(temperatures + row * stride_temperature).to(tl.float32)
    if step_tensor is not None:
        step = tl.load(step_tensor)
    if seed_tensor is not None:
        seed = tl.load(seed_tensor)
    is_arg_max = temperature == 0.0
    inverse = _inverse_temperature(temperature)
    own = partials + row * FIELDS * num_splits
    prior_peak, guided_peak, faults = _merge_peaks(own, num_splits, SPLITS)
    is_valid = (faults == 0.0) & (prior_peak < float("inf"))
    is_valid = is_valid & (guided_peak > float("-inf")) & (guided_peak < float("inf"))
    # Whatever a row without a law holds, it reads no memory beyond its own.
    prior_peak = tl.where(is_valid, prior_peak, 0.0)
    guided_peak = tl.where(is_valid, guided_peak, 0.0)
    prior_total, total, moment = _merge_sums(
        own, num_splits, prior_peak, guided_peak, inverse, SPLITS
    )
    key = tl.load(keys + row * stride_key).to(tl.int64)
    target = _uniform(seed.to(tl.int64), key, step.to(tl.int64)) * total
    split, before = _choose_split(own, num_splits, guided_peak, inverse, target, is_arg_max, SPLITS)

    ids = (split * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_token = ids < vocab_size
    products = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, rank, RANK):
        column = (first + tl.arange(0, RANK)).to(tl.int64)
        is_column = column < rank
        left = tl.load(directions + row * stride_dn + column * stride_dr, mask=is_column, other=0.0)
        right = tl.load(
            embeddings + ids[:, None] * stride_ev + column[None, :] * stride_er,
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        products += tl.sum(left.to(tl.float32)[None, :] * right.to(tl.float32), axis=1)
    prior = tl.load(logits + row * stride_ln + ids * stride_lv, mask=is_token, other=float("-inf"))
    prior = _clean(prior)
    guided = _clean(prior + products / alpha)
    heated = (guided - guided_peak) * inverse
    masses = tl.exp(heated).to(tl.float64)
    masses = tl.where(masses > 0.0, masses, 0.0)
    is_past = before + tl.cumsum(masses, axis=0) > target
    is_found = tl.where(is_arg_max, guided == tl.max(guided, axis=0), is_past & (masses > 0.0))
    place = tl.arange(0, TOKENS)
    chosen = tl.min(tl.where(is_found, place, TOKENS), axis=0)
    last = tl.max(tl.where(masses > 0.0, place, 0), axis=0)
    chosen = tl.where(chosen == TOKENS, last, chosen)
    # Of the sums, only those of the chosen token are not 0.
    prior_logit = tl.sum(tl.where(place == chosen, prior, 0.0), axis=0)
    law_logit = tl.sum(tl.where(place == chosen, heated, 0.0), axis=0)
    log_prior_total = tl.log(prior_total)
    log_total = tl.log(total)
    prior_logprob = (prior_logit - prior_peak).to(tl.float64) - log_prior_total
    prior_logprob = tl.minimum(prior_logprob, 0.0)
    guided_logprob = tl.minimum(law_logit.to(tl.float64) - log_total, 0.0)
    divergence = moment / total - log_total + log_prior_total
    divergence = tl.maximum(tl.where(is_arg_max, -prior_logprob, divergence), 0.0)
    guided_logprob = tl.where(is_arg_max, 0.0, guided_logprob)
    tl.store(out_ids + row, tl.where(is_valid, (split * TOKENS + chosen).to(tl.int64), 0))
    tl.store(out_priors + row, tl.where(is_valid, prior_logprob, float("-inf")).to(tl.float32))
    tl.store(out_guided + row, tl.where(is_valid, guided_logprob, float("-inf")).to(tl.float32))
    tl.store(out_kl + row, tl.where(is_valid, divergence, 0.0).to(tl.float32))
    tl.store(out_valid + row, is_valid)


def _pair(value: float | Tensor) -> tuple[Tensor | None, float]:
    """A parameter as kernels take it: one number a row, or None and one number for all."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, float(value))


def _int_pair(value: int | Tensor) -> tuple[Tensor | None, int | torch.SymInt]:
    """A seed or step as kernels take it, wrapped to 64 bits."""
    if isinstance(value, Tensor):
        return value, 0
    if isinstance(value, torch.SymInt):
        return None, value
    return None, (int(value) + 2**63) % 2**64 - 2**63


def _stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


def value_sample_tokens_triton(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    greedy: bool = False,
    seed: int | Tensor = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, ...]:
    """The Triton kernels, with the arguments of `value_sample_tokens_ref`; they cut nothing off."""
    rows, width = logits.shape
    rank = directions.shape[1]
    vocab_size = width if vocab_size is None else vocab_size
    outputs = (
        logits.new_empty((rows,), dtype=torch.int64),
        *(logits.new_empty((rows,), dtype=torch.float32) for _ in range(3)),
        logits.new_empty((rows,), dtype=torch.bool),
    )
    if rows == 0:
        return outputs
    num_splits = triton.cdiv(vocab_size, _TOKENS)
    num_tiles = triton.cdiv(rows, _ROWS)
    partials = logits.new_empty((rows, _FIELDS, num_splits), dtype=torch.float32)
    alphas, temperatures = _pair(alpha), _pair(0.0 if greedy else temperature)
    strides = (*logits.stride(), *directions.stride(), *token_embeddings.stride())
    per_row = (_stride(alphas[0]), _stride(temperatures[0]))
    operands = (logits, directions, token_embeddings)
    shared: dict[str, Any] = {"TOKENS": _TOKENS, "FIELDS": _FIELDS, "num_warps": _NUM_WARPS}
    is_same = directions.dtype == token_embeddings.dtype
    is_wide = not is_same or directions.dtype == torch.float32
    most = _MOST_WIDE_RANK if is_wide else _MOST_RANK
    with device_of(logits):
        _value_sample_tokens_kernel[(num_splits * num_tiles,)](
            *operands,
            *alphas,
            *temperatures,
            partials,
            *strides,
            *per_row,
            rows,
            rank,
            num_splits,
            num_tiles,
            vocab_size,
            WIDENS=not is_same,
            ROWS=_ROWS,
            RANK=min(max(triton.next_power_of_2(max(rank, 1)), _LEAST_RANK), most),
            **shared,
        )
        _value_sample_tokens_row_kernel[(rows,)](
            *operands,
            keys,
            *alphas,
            *temperatures,
            *_int_pair(step),
            *_int_pair(seed),
            partials,
            *outputs,
            *strides,
            keys.stride(0),
            *per_row,
            rank,
            num_splits,
            vocab_size,
            RANK=_ROW_RANK,
            SPLITS=_SPLITS,
            **shared,
        )
    return outputs
