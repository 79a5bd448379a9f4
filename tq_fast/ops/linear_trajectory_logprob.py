"""log p(tau) of each row's tokens straight from hidden states: the logits are never whole.

    logits = scale * (hidden @ weight.T + bias)        softcap: softcap * tanh(logits / softcap)
    out[i] = sum over t < lengths[i] of log_softmax(logits[i, t])[tokens[i, t]]

Computed in fp32 from the matmul onward. Bytes: `V * D * itemsize` of weight for every block of
rows that fits the cache, instead of `N * T * V * 4` of logits written and read back.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from . import _checks
from ._dispatch import Backend, Op, native_function, python_function
from .trajectory_log_ratio import check_trajectories, sum_within

# Rows of weight per block of the reference: at N * T = 1024 its logits take 32 MB.
_BLOCK = 8192


class _Parameters(TypedDict):
    bias: Tensor | None
    scale: float
    softcap: float | None
    vocab_size: int | None


def linear_trajectory_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum over tokens of `torch.log_softmax(F.linear(hidden, weight), -1)[token]`.

    Scores roll-outs under a model for the indirect weights of Transfer Q* (arXiv 2405.20495).

    Args:
        hidden: `[N, T, D]`, floating point, the states that predict `tokens`.
        weight: `[V, D]`, the dtype of hidden; the language-model head.
        tokens: int64 or int32 `[N, T]`; those at or beyond a length are not read.
        lengths: int64 or int32 `[N]`, 0 to T.
        bias: `[V]`, added before scale; None: no bias.
        scale: factor on the logits.
        softcap: bounds the scaled logits, above 0; None: not bounded.
        vocab_size: rows of weight from here on are padding and take no part.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        fp32 `[N]`, at most 0; 0 for an empty row, NaN where a token within the
        length is not in [0, vocab_size) or a row has no valid logit. A NaN logit counts as -inf.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    parameters: _Parameters = {
        "bias": bias,
        "scale": scale,
        "softcap": softcap,
        "vocab_size": vocab_size,
    }
    _check(hidden, weight, tokens, lengths, **parameters)
    return _OP(backend, hidden, weight, tokens, lengths, **parameters)


def _check(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
) -> None:
    op = "linear_trajectory_logprob"
    tensors = {"hidden": hidden, "weight": weight, "tokens": tokens, "lengths": lengths}
    _checks.require_tensors(op, **tensors, **_checks.given(bias=bias))
    _checks.require_dim(op, "hidden", hidden, 3, "[N, T, D]")
    _checks.require_float(op, "hidden", hidden)
    rows, length, size = hidden.shape
    _checks.require_dim(op, "weight", weight, 2, "[V, D]")
    _checks.require_shape(op, "weight", weight, (weight.shape[0], size), "[V, D of hidden]")
    _checks.require_dtype(op, "weight", weight, hidden.dtype)
    if bias is not None:
        _checks.require_shape(op, "bias", bias, (weight.shape[0],), "[V]")
        _checks.require_float(op, "bias", bias)
    bound = weight.shape[0] if vocab_size is None else vocab_size
    _checks.require_count(op, "vocab_size", bound, 1, weight.shape[0])
    _checks.require_number(op, "scale", scale)
    _checks.require_softcap(op, softcap)
    check_trajectories(op, tokens, lengths, rows, length)
    _checks.refuse_grad(op, hidden=hidden, weight=weight, bias=bias)


def linear_trajectory_logprob_ref(
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
    """The reference of `linear_trajectory_logprob`: blocks of the vocabulary, fp32 inside."""
    if vocab_size is None:
        vocab_size = weight.shape[0]
    states = hidden.to(torch.float32).flatten(0, 1)
    ids = tokens.to(torch.int64).flatten()
    lse = states.new_full(ids.shape, -torch.inf)
    chosen = torch.full_like(lse, -torch.inf)
    for start in range(0, vocab_size, _BLOCK):
        end = min(start + _BLOCK, vocab_size)
        logits = states @ weight[start:end].to(torch.float32).T
        if bias is not None:
            logits = logits + bias[start:end].to(torch.float32)
        logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        lse = torch.logaddexp(lse, logits.logsumexp(dim=-1))
        here = (ids >= start) & (ids < end)
        local = torch.where(here, ids - start, 0).unsqueeze(-1)
        chosen = torch.where(here, logits.gather(-1, local).squeeze(-1), chosen)
    logprobs = (chosen - lse).clamp(max=0.0)
    known = (ids >= 0) & (ids < vocab_size)
    return sum_within(torch.where(known, logprobs, torch.nan).view(tokens.shape), lengths)


def linear_trajectory_logprob_cpu(
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
    """The C++ kernel, with the arguments of the reference."""
    return torch.ops.tq_fast.linear_trajectory_logprob.default(
        hidden,
        weight,
        tokens,
        lengths,
        bias,
        scale,
        softcap,
        weight.size(0) if vocab_size is None else vocab_size,
    )


def _fake(hidden: Tensor, *arguments: Any) -> Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


def _refuse_float64(hidden: Tensor, *arguments: Any, **parameters: Any) -> str | None:
    return _checks.refuse_float64(hidden=hidden)


_OP = Op(
    "linear_trajectory_logprob",
    linear_trajectory_logprob_ref,
    Backend(
        "triton",
        python_function(
            "tq_fast.kernels.linear_trajectory_logprob", "linear_trajectory_logprob_triton"
        ),
        _refuse_float64,
    ),
    Backend(
        "cpu",
        native_function("linear_trajectory_logprob", linear_trajectory_logprob_cpu, _fake),
        _refuse_float64,
    ),
)
