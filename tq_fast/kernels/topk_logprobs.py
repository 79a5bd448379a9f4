"""topk_logprobs in Triton: maxima of small groups, then the k groups that can hold the k largest.

The first kernel reads every logit once: a program takes one split of one row, whole in registers,
and leaves (peak, sum of exp(x - peak)) of the split and the largest value of each of its groups of
64 neighbours. The second, one program a row, merges the splits in order and takes the k best groups
by (largest value descending, place ascending): an element of any other group has k elements before
it, one in each of these. Their 64 k elements are read again and sorted; the rest never is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_of

# Logits that a program of the first kernel holds in registers: 32 for each of its 128 threads.
_SPLIT = 4096
_NUM_WARPS = 4
_GROUP = 64
# The finaliser's tile of splits.
_SPLITS = 32

# The key of no element, below every other.
_NO_KEY = tl.constexpr(-(2**63))
_LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _load_clean(logits, ids, stride_v, mask, temperature, HAS_TEMPERATURE: tl.constexpr):
    """fp32 logits over the temperature, NaN as -inf: compiled and interpreted maxima treat NaN
    differently. -inf where `mask` is not set."""
    values = tl.load(logits + ids.to(tl.int64) * stride_v, mask=mask, other=float("-inf"))
    values = values.to(tl.float32)
    if HAS_TEMPERATURE:
        # Rounded as PyTorch rounds it: another quotient could break or make a tie.
        values = tl.div_rn(values, tl.zeros_like(values) + temperature)
    return tl.where(values == values, values, float("-inf"))


@triton.jit
def _ordered_key(values, places, exists):
    """int64 keys: the larger value has the larger, among equals the lower place; else _NO_KEY."""
    # Adding 0 turns -0 into +0: the two compare equal but their bits do not.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (places.to(tl.int64) ^ _LOW_WORD)
    return tl.where(exists, keys, _NO_KEY)


@triton.jit
def _value_of_key(keys):
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=("num_splits",))
def _topk_logprobs_kernel(
    logits,
    temperatures,
    temperature,
    states,
    group_peaks,
    stride_n,
    stride_v,
    stride_temperature,
    num_splits,
    vocab_size,
    HAS_TEMPERATURE: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """states[row, split] = (peak, sum); group_peaks[row, split * SPLIT / GROUP + group].

    Programs: [N * num_splits], the splits of a row side by side.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // num_splits
    ids = (program % num_splits) * SPLIT + tl.arange(0, SPLIT)
    if temperatures is not None:
        temperature = tl.load(temperatures + row * stride_temperature).to(tl.float32)
    values = _load_clean(
        logits + row * stride_n, ids, stride_v, ids < vocab_size, temperature, HAS_TEMPERATURE
    )
    peaks = tl.max(tl.reshape(values, (SPLIT // GROUP, GROUP)), axis=1)
    peak = tl.max(peaks, axis=0)
    # A split of -inf only takes 0 as its peak: exp(-inf - 0) is 0, but -inf - -inf would be NaN.
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(states + program * 2, peak)
    tl.store(states + program * 2 + 1, tl.sum(tl.exp(values - shift), axis=0))
    group = program * (SPLIT // GROUP) + tl.arange(0, SPLIT // GROUP)
    tl.store(group_peaks + group, peaks)


@triton.jit
def _merge_splits(states, num_splits, SPLITS: tl.constexpr):
    """(peak, sum) over all splits, in their order."""
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        mask = split < num_splits
        peaks = tl.load(states + split * 2, mask=mask, other=float("-inf"))
        sums = tl.load(states + split * 2 + 1, mask=mask, other=0.0)
        highest = tl.maximum(peak, tl.max(peaks, axis=0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(peak - shift) + tl.sum(sums * tl.exp(peaks - shift), axis=0)
        peak = highest
    return peak, total


@triton.jit(do_not_specialize=("num_splits", "k"))
def _topk_logprobs_row_kernel(
    logits,
    temperatures,
    temperature,
    states,
    group_peaks,
    ids,
    logprobs,
    lse,
    stride_n,
    stride_v,
    stride_temperature,
    num_splits,
    vocab_size,
    k,
    HAS_TEMPERATURE: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
):
    """ids, logprobs [N, k] and lse [N]. Programs: [N]. GROUPS and K: powers of 2, GROUPS >= K."""
    row = tl.program_id(0).to(tl.int64)
    peak, total = _merge_splits(states + row * num_splits * 2, num_splits, SPLITS)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = tl.log(total)
    tl.store(lse + row, shift + log_sum)

    group = tl.arange(0, GROUPS)
    exists = group * GROUP < vocab_size
    own_peaks = group_peaks + row * num_splits * (SPLIT // GROUP)
    peaks = tl.load(own_peaks + group, mask=exists, other=float("-inf"))
    best_groups = tl.topk(_ordered_key(peaks, group, exists), K)
    chosen = (best_groups & _LOW_WORD) ^ _LOW_WORD
    wanted = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    exists = (best_groups > _NO_KEY)[:, None] & (wanted < vocab_size)
    if temperatures is not None:
        temperature = tl.load(temperatures + row * stride_temperature).to(tl.float32)
    values = _load_clean(
        logits + row * stride_n, wanted, stride_v, exists, temperature, HAS_TEMPERATURE
    )
    best = tl.topk(tl.reshape(_ordered_key(values, wanted, exists), (K * GROUP,)), K)
    rank = tl.arange(0, K)
    value = _value_of_key(best)
    logprob = tl.where(total > 0.0, value - shift - log_sum, float("-inf"))
    tl.store(ids + row * k + rank, (best & _LOW_WORD) ^ _LOW_WORD, mask=rank < k)
    tl.store(logprobs + row * k + rank, logprob, mask=rank < k)


def topk_logprobs_triton(
    logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernels, with the arguments of `topk_logprobs_ref`; k up to 128."""
    rows, width = logits.shape
    vocab_size = width if vocab_size is None else vocab_size
    ids = logits.new_empty((rows, k), dtype=torch.int64)
    logprobs = logits.new_empty((rows, k), dtype=torch.float32)
    lse = logits.new_empty((rows,), dtype=torch.float32)
    if rows == 0:
        return ids, logprobs, lse
    num_splits = triton.cdiv(vocab_size, _SPLIT)
    states = logits.new_empty((rows, num_splits, 2), dtype=torch.float32)
    group_peaks = logits.new_empty((rows, num_splits, _SPLIT // _GROUP), dtype=torch.float32)
    temperatures, number = None, 1.0
    if isinstance(temperature, Tensor):
        temperatures = temperature
    else:
        number = float(temperature)
    divides = temperatures is not None or number != 1.0
    # Leave the exact division out where it divides by 1: it costs more than all the rest.
    common = {"HAS_TEMPERATURE": divides, "SPLIT": _SPLIT, "GROUP": _GROUP}
    strides = (*logits.stride(), 0 if temperatures is None else temperatures.stride(0))
    most = max(triton.next_power_of_2(k), 2)
    groups = triton.next_power_of_2(triton.cdiv(vocab_size, _GROUP))
    with device_of(logits):
        _topk_logprobs_kernel[(rows * num_splits,)](
            logits,
            temperatures,
            number,
            states,
            group_peaks,
            *strides,
            num_splits,
            vocab_size,
            num_warps=_NUM_WARPS,
            **common,
        )
        _topk_logprobs_row_kernel[(rows,)](
            logits,
            temperatures,
            number,
            states,
            group_peaks,
            ids,
            logprobs,
            lse,
            *strides,
            num_splits,
            vocab_size,
            k,
            SPLITS=_SPLITS,
            GROUPS=max(groups, most),
            K=most,
            num_warps=8 if max(groups, most * _GROUP) > 2048 else _NUM_WARPS,
            **common,
        )
    return ids, logprobs, lse
