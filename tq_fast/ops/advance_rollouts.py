"""One depth of every roll-out: draw, append, add both log-probabilities, note EOS; in place.

    sampled = sample_tokens(logits, keys, step, ...)
    for each row i that is not finished:
        tokens[i, lengths[i]] = sampled.ids[i];  lengths[i] += 1
        logprob_sums[i] += sampled.logprobs[i];  proposal_logprob_sums[i] += ...
        finished[i] = sampled.ids[i] in eos

Bytes: the logits, as sample_tokens; the state is a few numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, philox
from ._checks import PerRow
from ._dispatch import Backend, Op, native_function
from .sample_tokens import (
    SamplerParameters,
    check_sampler,
    refuse_cpu,
    refuse_cuda,
    sample_tokens_ref,
    split_sampler,
)


def advance_rollouts_(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    logprob_sums: Tensor,
    proposal_logprob_sums: Tensor,
    eos: Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
    backend: str | None = None,
) -> None:
    """`sample_tokens`, and its outcome written into the state of the roll-outs.

    Step 2 of Algorithm 1 of Transfer Q* (arXiv 2405.20495). A finished row is left alone, and so
    is a row whose `tokens` are full. A row without any valid logit becomes finished and its
    logprob_sums becomes NaN, so that the caller can see it. The arguments `logits`, `keys`, `step`,
    `temperature`, `top_k`, `top_p`, `vocab_size` and `seed` are those of `sample_tokens`.

    Args:
        tokens: int64 or int32 `[N, L]`, written at `lengths`.
        lengths: int64 or int32 `[N]`, tokens of each roll-out so far, 0 to L; a row with any
            other is left alone.
        finished: bool `[N]`.
        logprob_sums: fp32 `[N]`, sum of the model's own log-probs.
        proposal_logprob_sums: fp32 `[N]`, sum of the log-density drawn from.
        eos: int64 or int32 `[E]`, the ids that end a roll-out; may be empty.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    name = "advance_rollouts_"
    state = (tokens, lengths, finished, logprob_sums, proposal_logprob_sums, eos)
    parameters: SamplerParameters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "vocab_size": vocab_size,
        "seed": seed,
    }
    check_sampler(name, logits, keys, step, **parameters)
    _check_state(name, logits, *state)
    _OP(backend, logits, keys, step, *state, **parameters)


def advance_rollouts_ref(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    logprob_sums: Tensor,
    proposal_logprob_sums: Tensor,
    eos: Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
) -> None:
    """The reference of `advance_rollouts_`: `sample_tokens_ref` and masked updates."""
    sampled = sample_tokens_ref(
        logits,
        keys,
        step,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=vocab_size,
        seed=seed,
    )
    capacity = tokens.shape[1]
    live = ~finished & (lengths >= 0) & (lengths < capacity)
    writes = live & sampled.valid
    if capacity > 0:
        slot = lengths.to(torch.int64).clamp(0, capacity - 1).unsqueeze(-1)
        kept = tokens.gather(-1, slot)
        written = torch.where(
            writes.unsqueeze(-1), sampled.ids.unsqueeze(-1).to(tokens.dtype), kept
        )
        tokens.scatter_(-1, slot, written)
    lengths.add_(writes.to(lengths.dtype))
    logprobs = torch.where(sampled.valid, sampled.logprobs, torch.nan)
    logprob_sums.add_(torch.where(live, logprobs, 0.0))
    proposal_logprob_sums.add_(torch.where(writes, sampled.proposal_logprobs, 0.0))
    ends = (sampled.ids.unsqueeze(-1) == eos).any(dim=-1)
    finished.logical_or_(live & (ends | ~sampled.valid))


def _check_state(
    op: str,
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    logprob_sums: Tensor,
    proposal_logprob_sums: Tensor,
    eos: Tensor,
) -> None:
    sums = {"logprob_sums": logprob_sums, "proposal_logprob_sums": proposal_logprob_sums}
    written = {"tokens": tokens, "lengths": lengths, "finished": finished, **sums}
    _checks.require_tensors(op, logits=logits, **written, eos=eos)
    _checks.require_apart(op, **written)
    rows = logits.shape[0]
    _checks.require_dim(op, "tokens", tokens, 2, "[N, L]")
    _checks.require_shape(op, "tokens", tokens, (rows, tokens.shape[1]), "[N, L]")
    _checks.require_integer(op, "tokens", tokens)
    _checks.require_shape(op, "lengths", lengths, (rows,), "[N]")
    _checks.require_integer(op, "lengths", lengths)
    _checks.require_shape(op, "finished", finished, (rows,), "[N]")
    _checks.require_dtype(op, "finished", finished, torch.bool)
    for name, tensor in sums.items():
        _checks.require_shape(op, name, tensor, (rows,), "[N]")
        _checks.require_dtype(op, name, tensor, torch.float32)
    _checks.require_dim(op, "eos", eos, 1, "[E]")
    _checks.require_integer(op, "eos", eos)
    _checks.refuse_grad(op, **sums)


def advance_rollouts_native(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    tokens: Tensor,
    lengths: Tensor,
    finished: Tensor,
    logprob_sums: Tensor,
    proposal_logprob_sums: Tensor,
    eos: Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    seed: int | Tensor = 0,
) -> None:
    """The C++ or CUDA kernel, by the device, with the arguments of the reference.

    The kernel skips the rows that are finished.
    """
    torch.ops.tq_fast.advance_rollouts_.default(
        logits,
        keys,
        *philox.split_int64(step),
        tokens,
        lengths,
        finished,
        logprob_sums,
        proposal_logprob_sums,
        eos,
        *split_sampler(logits, temperature, top_k, top_p, vocab_size, seed),
    )


def _fake(*arguments: Any) -> None:
    return None


_OP = Op(
    "advance_rollouts_",
    advance_rollouts_ref,
    Backend(
        "cuda",
        native_function("advance_rollouts_", advance_rollouts_native, _fake, "cuda"),
        refuse_cuda,
    ),
    Backend(
        "cpu", native_function("advance_rollouts_", advance_rollouts_native, _fake), refuse_cpu
    ),
)
