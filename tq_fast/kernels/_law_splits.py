"""What the law of a row is merged from, split by split, and how one token of it is drawn.

A split leaves six numbers of each row, num_splits apart: the peak and the sum of the prior; the
peak, the sum and the moment of the law; how many of its values are not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NO_SPLIT = tl.constexpr(2**30)
# The purpose ROLLOUT of philox.py, in the high word of the seed.
_PURPOSE = tl.constexpr(1 << 32)
_HALF_SPACING = tl.constexpr(2.0**-54)
_SPACING = tl.constexpr(2.0**-53)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-53)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def clean(values):
    """fp32, NaN as -inf: compiled and interpreted maxima treat NaN differently."""
    values = values.to(tl.float32)
    return tl.where(values == values, values, float("-inf"))


@triton.jit
def reference_of(peak):
    """What exponentials refer to: a set of -inf only takes 0, since -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, at most the largest float; 1 for an arg max."""
    is_arg_max = temperature == 0.0
    return tl.minimum(1.0 / tl.where(is_arg_max, 1.0, temperature), _LARGEST)


@triton.jit
def uniform(seed, key, step):
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
def merge_peaks(own, num_splits, SPLITS: tl.constexpr):
    """(peak of the prior, peak of the law, whether there is a law) of a row.

    The peaks are finite: without a law they are 0, and what the row then draws is thrown away.
    """
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
    is_valid = (faults == 0.0) & (prior_peak < float("inf"))
    is_valid &= (guided_peak > float("-inf")) & (guided_peak < float("inf"))
    return tl.where(is_valid, prior_peak, 0.0), tl.where(is_valid, guided_peak, 0.0), is_valid


@triton.jit
def merge_sums(own, num_splits, prior_peak, guided_peak, inverse, SPLITS: tl.constexpr):
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
def choose_split(own, num_splits, guided_peak, inverse, target, is_arg_max, SPLITS: tl.constexpr):
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


@triton.jit
def choose_token(guided, heated, before, target, is_arg_max, TOKENS: tl.constexpr):
    """The place in its split of the token that is drawn."""
    masses = tl.exp(heated).to(tl.float64)
    masses = tl.where(masses > 0.0, masses, 0.0)
    is_past = before + tl.cumsum(masses, axis=0) > target
    is_found = tl.where(is_arg_max, guided == tl.max(guided, axis=0), is_past & (masses > 0.0))
    place = tl.arange(0, TOKENS)
    chosen = tl.min(tl.where(is_found, place, TOKENS), axis=0)
    last = tl.max(tl.where(masses > 0.0, place, 0), axis=0)
    return tl.where(chosen == TOKENS, last, chosen)


@triton.jit
def value_at(values, place, TOKENS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, TOKENS) == place, values, 0.0), axis=0)
