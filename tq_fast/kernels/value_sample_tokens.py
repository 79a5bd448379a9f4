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

from ._device import all_registers, device_of
from ._law_splits import (
    choose_split,
    choose_token,
    clean,
    inverse_temperature,
    merge_peaks,
    merge_sums,
    reference_of,
    uniform,
    value_at,
)

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
# What a split leaves of a row: see _law_splits.py.
_FIELDS = 6

_COUNTS = ("rows", "rank", "num_splits", "num_tiles")


@triton.jit
def _multiply_tile(
    directions,
    embeddings,
    stride_dr,
    stride_er,
    is_row,
    is_token,
    rank,
    WIDENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
):
    """fp32 `[ROWS, TOKENS]` of rows at `directions [ROWS, 1]` and `embeddings [1, TOKENS]`."""
    products = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, rank, RANK):
        column = (first + tl.arange(0, RANK)).to(tl.int64)
        is_column = column < rank
        left = tl.load(
            directions + column[None, :] * stride_dr, mask=is_row & is_column[None, :], other=0.0
        )
        right = tl.load(
            embeddings + column[:, None] * stride_er, mask=is_token & is_column[:, None], other=0.0
        )
        if WIDENS:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
    return products


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
    products = _multiply_tile(
        directions + row[:, None] * stride_dn,
        embeddings + ids[None, :] * stride_ev,
        stride_dr,
        stride_er,
        is_row[:, None],
        is_token[None, :],
        rank,
        WIDENS,
        ROWS,
        TOKENS,
        RANK,
    )
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
    prior = clean(prior)
    guided = clean(prior + q)
    faults = (prior > float("-inf")) & ~(tl.abs(q) < float("inf"))

    prior_peak = tl.max(prior, axis=1)
    guided_peak = tl.max(guided, axis=1)
    apart = prior - reference_of(prior_peak)[:, None]
    heated = (guided - reference_of(guided_peak)[:, None]) * inverse_temperature(temperature)
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
def _multiply_row(
    directions,
    embeddings,
    stride_dr,
    stride_er,
    is_token,
    rank,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
):
    """fp32 `[TOKENS]` of one row at `directions` and of the rows at `embeddings [TOKENS, 1]`."""
    products = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, rank, RANK):
        column = (first + tl.arange(0, RANK)).to(tl.int64)
        is_column = column < rank
        left = tl.load(directions + column * stride_dr, mask=is_column, other=0.0)
        right = tl.load(
            embeddings + column[None, :] * stride_er, mask=is_token & is_column[None, :], other=0.0
        )
        products += tl.sum(left.to(tl.float32)[None, :] * right.to(tl.float32), axis=1)
    return products


@triton.jit
def _load_number(values, number, offset):
    """A parameter that is one number for all rows, or is loaded."""
    if values is not None:
        number = tl.load(values + offset)
    # Adding makes a tensor of a number that was compiled in.
    return number + tl.zeros((), tl.int1)


@triton.jit
def _report(
    out_logs,
    stride_logs,
    is_valid,
    is_arg_max,
    prior_logprob,
    guided_logprob,
    divergence,
):
    """Store both log-probabilities, which rounding lifts above 0 in no case, and kl, at least 0."""
    prior_logprob = tl.minimum(prior_logprob, 0.0)
    guided_logprob = tl.where(is_arg_max, 0.0, tl.minimum(guided_logprob, 0.0))
    divergence = tl.maximum(tl.where(is_arg_max, -prior_logprob, divergence), 0.0)
    prior_logprob = tl.where(is_valid, prior_logprob, float("-inf"))
    guided_logprob = tl.where(is_valid, guided_logprob, float("-inf"))
    tl.store(out_logs, prior_logprob.to(tl.float32))
    tl.store(out_logs + stride_logs, guided_logprob.to(tl.float32))
    tl.store(out_logs + 2 * stride_logs, tl.where(is_valid, divergence, 0.0).to(tl.float32))


@triton.jit(do_not_specialize=("step", "seed", "rank", "num_splits", "stride_logs"))
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
    out_logs,
    out_valid,
    stride_logs,
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
    alpha = _load_number(alphas, alpha, row * stride_alpha).to(tl.float32)
    temperature = _load_number(temperatures, temperature, row * stride_temperature).to(tl.float32)
    seed = _load_number(seed_tensor, seed, 0).to(tl.int64)
    step = _load_number(step_tensor, step, 0).to(tl.int64)
    is_arg_max = temperature == 0.0
    inverse = inverse_temperature(temperature)
    own = partials + row * FIELDS * num_splits
    prior_peak, guided_peak, is_valid = merge_peaks(own, num_splits, SPLITS)
    prior_total, total, moment = merge_sums(
        own, num_splits, prior_peak, guided_peak, inverse, SPLITS
    )
    target = uniform(seed, tl.load(keys + row * stride_key).to(tl.int64), step) * total
    split, before = choose_split(own, num_splits, guided_peak, inverse, target, is_arg_max, SPLITS)
    ids = (split * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_token = ids < vocab_size
    products = _multiply_row(
        directions + row * stride_dn,
        embeddings + ids[:, None] * stride_ev,
        stride_dr,
        stride_er,
        is_token[:, None],
        rank,
        TOKENS,
        RANK,
    )
    prior = tl.load(logits + row * stride_ln + ids * stride_lv, mask=is_token, other=float("-inf"))
    prior = clean(prior)
    guided = clean(prior + products / alpha)
    heated = (guided - guided_peak) * inverse
    chosen = choose_token(guided, heated, before, target, is_arg_max, TOKENS)
    prior_logit = value_at(prior, chosen, TOKENS)
    law_logit = value_at(heated, chosen, TOKENS)
    tl.store(out_ids + row, tl.where(is_valid, (split * TOKENS + chosen).to(tl.int64), 0))
    tl.store(out_valid + row, is_valid)
    _report(
        out_logs + row,
        stride_logs,
        is_valid,
        is_arg_max,
        (prior_logit - prior_peak).to(tl.float64) - tl.log(prior_total),
        law_logit.to(tl.float64) - tl.log(total),
        moment / total - tl.log(total) + tl.log(prior_total),
    )


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
    ids = logits.new_empty((rows,), dtype=torch.int64)
    logs = logits.new_empty((3, rows), dtype=torch.float32)
    valid = logits.new_empty((rows,), dtype=torch.bool)
    if rows == 0:
        return ids, *logs.unbind(), valid
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
            ids,
            logs,
            valid,
            rows,
            *strides,
            keys.stride(0),
            *per_row,
            rank,
            num_splits,
            vocab_size,
            RANK=_ROW_RANK,
            SPLITS=_SPLITS,
            **shared,
            **all_registers(),
        )
    return ids, *logs.unbind(), valid
