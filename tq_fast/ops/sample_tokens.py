"""Draw one token a row from its logits, with both log-probabilities that a roll-out needs.

    x = logits[:, :vocab_size]                      the model
    y = x / temperature, top-k first, then top-p    the proposal
    id = first token id whose running mass of softmax(y) exceeds u * total
    logprobs = log_softmax(x)[id],  proposal_logprobs = log_softmax(y over what was kept)[id]

u is one Philox uniform a row, keyed by (seed, keys[row], step): see philox.py. Inverse CDF in
token-id order needs one random number a row where Gumbel-max needs one a token.
Bytes: the logits are read once to twice, `N * V * itemsize`; the rest is a few numbers a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import _checks, philox
from ._checks import PerRow
from ._dispatch import Backend, Op, native_function
from .topk_logprobs import clean_logits, logprobs_at, order_topk, shifted_logsumexp


class SampledTokens(NamedTuple):
    """`ids` int64, `logprobs` and `proposal_logprobs` fp32, `valid` bool: `[N]`."""

    ids: Tensor
    logprobs: Tensor
    proposal_logprobs: Tensor
    valid: Tensor


class SamplerParameters(TypedDict):
    """The keyword arguments that sample_tokens and advance_rollouts_ share."""

    temperature: PerRow
    top_k: PerRow
    top_p: PerRow
    vocab_size: int | None
    seed: int | Tensor


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
    backend: str | None = None,
) -> SampledTokens:
    """`torch.multinomial(softmax(logits / temperature), 1)` on a stream that packing cannot move.

    Step 2 of Algorithm 1 of Transfer Q* (arXiv 2405.20495): one token of a roll-out.

    Args:
        logits: `[N, V]`, floating point; NaN counts as -inf.
        keys: int64 `[N]`, the key of each row's random draw.
        step: int, or a one-element integer tensor.
        temperature: at least 0; 0, in fp32, is arg max, the lowest id on ties. A number or `[N]`.
        top_k: keep the k largest (ties: lower id first), before top_p; 0 keeps all. Or `[N]`.
        top_p: then keep the smallest set, from the most likely down, whose share of the mass
            that top_k left is at least top_p; always at least one token. A number or `[N]`.
        vocab_size: columns from here on are padding and take no part.
        seed: any int64, or a one-element int64 tensor.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        SampledTokens. logprobs is the model's own, at temperature 1 over the whole vocabulary;
        proposal_logprobs is the density drawn from, 0 at temperature 0. A row without any
        finite logit, or with +inf, has valid False, id 0 and both log-probs -inf.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    parameters: SamplerParameters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "vocab_size": vocab_size,
        "seed": seed,
    }
    check_sampler("sample_tokens", logits, keys, step, **parameters)
    return SampledTokens._make(_OP(backend, logits, keys, step, **parameters))


def check_sampler(
    op: str,
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    temperature: PerRow,
    top_k: PerRow,
    top_p: PerRow,
    vocab_size: int | None,
    seed: int | Tensor,
) -> None:
    """The checks that sample_tokens and advance_rollouts_ share."""
    _checks.require_tensors(op, logits=logits, keys=keys)
    _checks.require_dim(op, "logits", logits, 2, "[N, V]")
    _checks.require_float(op, "logits", logits)
    _checks.refuse_grad(op, logits=logits)
    _checks.require_shape(op, "keys", keys, (logits.shape[0],), "[N]")
    _checks.require_integer(op, "keys", keys)
    _checks.require_int(op, "step", step, logits=logits)
    _checks.require_int(op, "seed", seed, logits=logits)
    _checks.require_per_row(op, "temperature", temperature, logits, 0.0)
    _checks.require_per_row(op, "top_k", top_k, logits, 0, _checks.LARGEST_COUNT, is_count=True)
    _checks.require_per_row(op, "top_p", top_p, logits, 0.0, 1.0)
    _checks.bound_vocab(op, logits, vocab_size)


def sample_tokens_ref(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
) -> SampledTokens:
    """The reference of `sample_tokens`: plain PyTorch, fp32 logits and fp64 masses."""
    values = clean_logits(logits, vocab_size)
    log_norm, peak = shifted_logsumexp(values)
    valid = log_norm.isfinite().squeeze(-1)
    # argmax names the first maximal value, which is the lowest id.
    greedy_ids = values.argmax(dim=-1)
    if not isinstance(temperature, Tensor) and temperature < _checks.SMALLEST:
        ids, proposal = greedy_ids, torch.zeros_like(peak).squeeze(-1)
    else:
        uniform = philox.uniform(seed, philox.ROLLOUT, keys, step)
        heat = _checks.as_column(temperature, torch.float32)
        ids, proposal = _draw(values, peak, uniform, heat, top_k, top_p)
        if isinstance(heat, Tensor):
            greedy = heat.squeeze(-1) == 0
            ids = torch.where(greedy, greedy_ids, ids)
            proposal = torch.where(greedy, 0.0, proposal)
    logprobs = logprobs_at(values, ids.unsqueeze(-1), log_norm, peak).squeeze(-1)
    return SampledTokens(
        torch.where(valid, ids, 0),
        torch.where(valid, logprobs, -torch.inf),
        torch.where(valid, proposal, -torch.inf),
        valid,
    )


def _draw(
    values: Tensor, peak: Tensor, uniform: Tensor, heat: PerRow, top_k: PerRow, top_p: PerRow
) -> tuple[Tensor, Tensor]:
    """Inverse CDF over the truncated softmax of `values / heat`; (ids, log-probs) `[N]`."""
    shifted = (values - peak) / heat
    masses = torch.where(_kept(shifted, top_k, top_p), shifted.exp(), 0.0)
    running = masses.cumsum(dim=-1, dtype=torch.float64)
    total = running[:, -1:]
    ids = torch.searchsorted(running, uniform.unsqueeze(-1) * total, right=True)
    # Rounding can lift u * total to the total itself: then it is the last token with mass.
    ids = torch.minimum(ids, (running < total).sum(dim=-1, keepdim=True))
    ids = ids.clamp(max=values.shape[-1] - 1)
    proposal = shifted.gather(-1, ids) - total.log().to(torch.float32)
    return ids.squeeze(-1), proposal.squeeze(-1).clamp(max=0.0)


def proposal_logprobs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probs `[N, V]` of the whole law that `sample_tokens` draws from, fp32.

    Tokens that temperature and truncation leave out have -inf. Temperature is above 0. In PyTorch.
    """
    values = clean_logits(logits, vocab_size)
    return kept_logits(values, temperature, top_k, top_p).log_softmax(dim=-1)


def kept_logits(values: Tensor, heat: PerRow, top_k: PerRow, top_p: PerRow) -> Tensor:
    """`(values - peak) / heat` of fp32 `[N, V]`; -inf for what top-k, and then top-p, cut off."""
    shifted = (values - values.amax(dim=-1, keepdim=True)) / heat
    return torch.where(_kept(shifted, top_k, top_p), shifted, -torch.inf)


def _kept(shifted: Tensor, top_k: PerRow, top_p: PerRow) -> Tensor:
    """Bool, broadcastable against `[N, V]`: what top-k, and then top-p, leave of each row."""
    width = shifted.shape[-1]
    num_first = width if isinstance(top_k, Tensor) or top_k == 0 else min(int(top_k), width)
    cuts_mass = isinstance(top_p, Tensor) or top_p < 1.0
    if num_first == width and not cuts_mass and not isinstance(top_k, Tensor):
        return torch.ones((), dtype=torch.bool, device=shifted.device)
    ids = order_topk(shifted, num_first)
    rank = torch.arange(num_first, device=shifted.device)
    limit = _checks.as_column(top_k, torch.int64)
    limit = torch.where(limit > 0, limit, width) if isinstance(limit, Tensor) else num_first
    masses = torch.where(rank < limit, shifted.gather(-1, ids).exp(), 0.0).to(torch.float64)
    running = masses.cumsum(dim=-1)
    wanted = _checks.as_column(top_p, torch.float64) * running[:, -1:]
    # A token stays while the mass before it falls short. Rank 0 stays whatever top_p is.
    kept = (rank < limit) & ((running - masses < wanted) | (rank == 0))
    return torch.zeros_like(shifted, dtype=torch.bool).scatter(-1, ids, kept)


def sample_tokens_native(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The C++ or CUDA kernel, by the device, with the arguments of the reference."""
    return torch.ops.tq_fast.sample_tokens.default(
        logits,
        keys,
        *philox.split_int64(step),
        *split_sampler(logits, temperature, top_k, top_p, vocab_size, seed),
    )


def split_sampler(
    logits: Tensor,
    temperature: PerRow,
    top_k: PerRow,
    top_p: PerRow,
    vocab_size: int | None,
    seed: int | Tensor,
) -> tuple[Any, ...]:
    """The last arguments of the C++ schemas of sample_tokens and advance_rollouts_."""
    return (
        *_checks.split_per_row(temperature),
        *_checks.split_per_row(top_k),
        *_checks.split_per_row(top_p),
        logits.size(-1) if vocab_size is None else vocab_size,
        *philox.split_int64(seed),
    )


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    dtypes = (torch.int64, torch.float32, torch.float32, torch.bool)
    ids, logprobs, proposals, valid = (logits.new_empty((rows,), dtype=d) for d in dtypes)
    return ids, logprobs, proposals, valid


def refuse_cpu(logits: Tensor, *arguments: Any, **parameters: Any) -> str | None:
    """Why the C++ kernels of sample_tokens and advance_rollouts_ do not take these inputs."""
    return _checks.refuse_float64(logits=logits)


# Ids inside a row, and the tables of its tiles in shared memory, have room for so many tokens.
_MOST_CUDA_VOCAB = 2**22
# The arguments between the logits and the parameters: sample_tokens takes the first two.
_STATE = (
    "keys",
    "step",
    "tokens",
    "lengths",
    "finished",
    "logprob_sums",
    "proposal_logprob_sums",
    "eos",
)


def refuse_cuda(
    logits: Tensor, *state: Any, vocab_size: int | None = None, **parameters: Any
) -> str | None:
    """Why the CUDA kernels of sample_tokens and advance_rollouts_ do not take these inputs."""
    width = logits.shape[-1] if vocab_size is None else vocab_size
    if width > _MOST_CUDA_VOCAB:
        return f"vocab_size is {width}; the kernel takes up to {_MOST_CUDA_VOCAB}"
    tensors = dict(zip(_STATE, state, strict=False))
    return _checks.refuse_float64(logits=logits) or _checks.refuse_other_device(
        logits, **tensors, **parameters
    )


_OP = Op(
    "sample_tokens",
    sample_tokens_ref,
    Backend(
        "cuda",
        native_function("sample_tokens", sample_tokens_native, _fake, "cuda"),
        refuse_cuda,
    ),
    Backend("cpu", native_function("sample_tokens", sample_tokens_native, _fake), refuse_cpu),
)
