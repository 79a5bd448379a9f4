"""log p(tau) - log q(tau) of each row's tokens, from the logits of two models.

    out[i] = sum over t < lengths[i] of
             log_softmax(logits_p[i, t])[tokens[i, t]] - log_softmax(logits_q[i, t])[tokens[i, t]]

Computed in fp32 from the logits onward: at bf16 a sum over 128 tokens is off by 0.15 to 0.46
nats. Bytes: both logits are read once, `2 * N * T * V * itemsize`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._dispatch import Backend, Op, native_function, python_function
from .topk_logprobs import clean_logits, logprobs_at, shifted_logsumexp


def trajectory_log_ratio(
    logits_p: Tensor,
    logits_q: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum over tokens of the difference of two `torch.log_softmax(logits, -1)[token]`.

    The log-ratio of the indirect weights of Transfer Q* (arXiv 2405.20495): p the SFT model,
    q the model that the roll-outs were drawn from.

    Args:
        logits_p: `[N, T, V]`, floating point; NaN counts as -inf.
        logits_q: likewise; the two V may differ where vocab_size bounds both.
        tokens: int64 or int32 `[N, T]`; those at or beyond a length are not read.
        lengths: int64 or int32 `[N]`, 0 to T.
        vocab_size: columns from here on are padding and take no part.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        fp32 `[N]`; 0 for an empty row, -inf where only p gives a token no mass, NaN
        where both do or a token within the length is not in [0, vocab_size).

    Raises:
        InvalidArgument: wrong shapes, dtypes or vocab_size, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    _check(logits_p, logits_q, tokens, lengths, vocab_size)
    return _OP(backend, logits_p, logits_q, tokens, lengths, vocab_size=vocab_size)


def _check(
    logits_p: Tensor, logits_q: Tensor, tokens: Tensor, lengths: Tensor, vocab_size: int | None
) -> None:
    op = "trajectory_log_ratio"
    tensors = {"logits_p": logits_p, "logits_q": logits_q, "tokens": tokens, "lengths": lengths}
    _checks.require_tensors(op, **tensors)
    _checks.require_dim(op, "logits_p", logits_p, 3, "[N, T, V]")
    _checks.require_float(op, "logits_p", logits_p)
    rows, length, width = logits_p.shape
    width_q = logits_q.shape[-1] if vocab_size is not None and logits_q.dim() == 3 else width
    _checks.require_shape(op, "logits_q", logits_q, (rows, length, width_q), "[N, T, V]")
    _checks.require_float(op, "logits_q", logits_q)
    vocab_size = _checks.bound_vocab(op, logits_p, vocab_size, "logits_p")
    _checks.bound_vocab(op, logits_q, vocab_size, "logits_q")
    check_trajectories(op, tokens, lengths, rows, length)
    _checks.refuse_grad(op, logits_p=logits_p, logits_q=logits_q)


def check_trajectories(op: str, tokens: Tensor, lengths: Tensor, rows: int, length: int) -> None:
    """The checks of tokens `[N, T]` and lengths `[N]` that both trajectory ops share."""
    _checks.require_shape(op, "tokens", tokens, (rows, length), "[N, T]")
    _checks.require_integer(op, "tokens", tokens)
    _checks.require_shape(op, "lengths", lengths, (rows,), "[N]")
    _checks.require_integer(op, "lengths", lengths)


def trajectory_log_ratio_ref(
    logits_p: Tensor,
    logits_q: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The reference of `trajectory_log_ratio`: plain PyTorch, fp32 terms summed in fp64."""
    width = logits_p.shape[-1] if vocab_size is None else vocab_size
    terms = _token_logprobs(logits_p, tokens, width) - _token_logprobs(logits_q, tokens, width)
    return sum_within(terms, lengths)


def sum_within(terms: Tensor, lengths: Tensor) -> Tensor:
    """fp32 `[N]`: the sum of each row of `[N, T]` before its length, accumulated in fp64."""
    within = torch.arange(terms.shape[1], device=terms.device) < lengths.unsqueeze(-1)
    return torch.where(within, terms, 0.0).sum(dim=-1, dtype=torch.float64).to(torch.float32)


def _token_logprobs(logits: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """fp32 `[N, T]`; NaN for a token that is not in the vocabulary."""
    values = clean_logits(logits, vocab_size)
    known = (tokens >= 0) & (tokens < vocab_size)
    ids = torch.where(known, tokens, 0).to(torch.int64).unsqueeze(-1)
    chosen = logprobs_at(values, ids, *shifted_logsumexp(values)).squeeze(-1)
    return torch.where(known, chosen, torch.nan)


def trajectory_log_ratio_cpu(
    logits_p: Tensor,
    logits_q: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The C++ kernel, with the arguments of the reference."""
    return torch.ops.tq_fast.trajectory_log_ratio.default(
        logits_p, logits_q, tokens, lengths, vocab_size
    )


def _fake(logits_p: Tensor, *arguments: Any) -> Tensor:
    return logits_p.new_empty((logits_p.shape[0],), dtype=torch.float32)


def _refuse_cpu(
    logits_p: Tensor, logits_q: Tensor, *arguments: Any, **parameters: Any
) -> str | None:
    return _checks.refuse_float64(logits_p=logits_p, logits_q=logits_q)


_OP = Op(
    "trajectory_log_ratio",
    trajectory_log_ratio_ref,
    Backend(
        "triton",
        python_function("tq_fast.kernels.trajectory_log_ratio", "trajectory_log_ratio_triton"),
    ),
    Backend(
        "cpu", native_function("trajectory_log_ratio", trajectory_log_ratio_cpu, _fake), _refuse_cpu
    ),
)
