"""Score the candidates of each prompt from their roll-outs, and choose the next token.

For each prompt g and candidate z, over its valid roll-outs i (steps 5 to 7 of Algorithm 1):

    w = softmax_i(log_weights)                           within each candidate
    Q = sum_i w_i r_i                                    estimator "mean"
    Q = alpha log sum_i w_i exp(r_i / alpha)             estimator "soft"
    score(z) = prior_logprobs(z) + Q / alpha
    final_logprobs = log_softmax_z(score)
    choice = arg max_z score(z), plus standard Gumbel noise keyed by token id unless greedy

Everything inside is float64; `3 * G * k * n` numbers are read.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import _checks, philox
from ._dispatch import Backend, Op, native_function

Estimator = Literal["mean", "soft"]
_IS_SOFT = {"mean": False, "soft": True}


class ReweightedSample(NamedTuple):
    """`choice` int64 `[G]`, an index into the k candidates; the others fp32 `[G, k]`.

    q and q_stderr are in units of the reward; ess in roll-outs.
    """

    choice: Tensor
    final_logprobs: Tensor
    q: Tensor
    q_stderr: Tensor
    ess: Tensor


class _Arguments(NamedTuple):
    """The arguments of `reweight_sample`; its checks, backends and refusals get them as one."""

    prior_logprobs: Tensor
    token_ids: Tensor
    rewards: Tensor
    log_weights: Tensor | None
    lengths: Tensor | None
    alpha: float
    estimator: Estimator
    greedy: bool
    seed: int | Tensor
    keys: Tensor | None
    step: int | Tensor

    @property
    def device(self) -> torch.device:
        """The device that the backend is chosen by."""
        return self.prior_logprobs.device


def reweight_sample(
    prior_logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    log_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    alpha: float,
    estimator: Estimator = "mean",
    greedy: bool = False,
    seed: int | Tensor = 0,
    keys: Tensor | None = None,
    step: int | Tensor = 0,
    backend: str | None = None,
) -> ReweightedSample:
    """`(prior_logprobs + q / alpha).softmax(-1).multinomial(1)`, with Q's error beside it.

    Steps 5 to 7 of Transfer Q* (arXiv 2405.20495, Algorithm 1 and eq. 5 or 12, by the prior).

    Args:
        prior_logprobs: `[G, k]`, floating point; -inf for a missing candidate.
        token_ids: int64 or int32 `[G, k]`; key the Gumbel noise and break ties.
        rewards: `[G, k, n]`, floating point.
        log_weights: `[G, k, n]`, up to a constant a candidate; None weighs evenly.
        lengths: int64 or int32 `[G, k]`, how many of the n are valid, 0 to n (a number beyond
            counts as the nearer end); None: all n.
        alpha: decoding temperature, above 0, in units of the reward.
        estimator: "mean" or "soft".
        greedy: arg max of the score, the lower token id on ties.
        seed: any int64, or a one-element int64 tensor.
        keys: int64 `[G]`, the key of each prompt's noise; None: 0 .. G-1.
        step: int, or a one-element integer tensor.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        ReweightedSample. q_stderr = sqrt(n/(n-1) sum_i w_i^2 (r_i - Q)^2) (for "soft", its delta
        method), NaN with fewer than two roll-outs: one roll-out says nothing of the spread.
        ess = 1 / sum_i w_i^2. A candidate whose score is NaN (no roll-out, a NaN reward, weights
        that are all -inf) counts as -inf and is never chosen while another can be.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    tensors = (prior_logprobs, token_ids, rewards, log_weights, lengths)
    arguments = _Arguments(*tensors, alpha, estimator, greedy, seed, keys, step)
    _check(arguments)
    return ReweightedSample._make(_OP(backend, arguments))


def reweight_sample_ref(
    prior_logprobs: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    log_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    alpha: float,
    estimator: Estimator = "mean",
    greedy: bool = False,
    seed: int | Tensor = 0,
    keys: Tensor | None = None,
    step: int | Tensor = 0,
) -> ReweightedSample:
    """The reference of `reweight_sample`: plain PyTorch in float64."""
    num_rollouts = rewards.shape[-1]
    if lengths is None:
        lengths = torch.full_like(token_ids, num_rollouts)
    lengths = lengths.clamp(0, num_rollouts)
    weights = _weights(rewards, log_weights, lengths)
    q, q_stderr = _estimate(rewards.to(torch.float64), weights, lengths, alpha, estimator)
    ess = torch.where(lengths > 0, weights.square().sum(dim=-1).reciprocal(), torch.nan)

    scores = prior_logprobs.to(torch.float64) + q / alpha
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    final_logprobs = scores - scores.logsumexp(dim=-1, keepdim=True)
    final_logprobs = torch.where(scores == -torch.inf, -torch.inf, final_logprobs)
    if not greedy:
        if keys is None:
            keys = torch.arange(scores.shape[0], device=scores.device)
        scores = scores + philox.gumbel(seed, keys.unsqueeze(-1), step, token_ids)
    return ReweightedSample(
        _first_largest(scores, token_ids),
        final_logprobs.to(torch.float32),
        q.to(torch.float32),
        q_stderr.to(torch.float32),
        ess.to(torch.float32),
    )


def _weights(rewards: Tensor, log_weights: Tensor | None, lengths: Tensor) -> Tensor:
    """Normalised weights `[G, k, n]` in float64, 0 beyond `lengths`; NaN where none is left."""
    rollout = torch.arange(rewards.shape[-1], device=rewards.device)
    valid = rollout < lengths.unsqueeze(-1)
    if log_weights is None:
        return valid / valid.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return torch.where(valid, log_weights.to(torch.float64), -torch.inf).softmax(dim=-1)


def _estimate(
    rewards: Tensor, weights: Tensor, lengths: Tensor, alpha: float, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """Q and its standard error, `[G, k]` in float64."""
    # A weight of 0 drops a reward whatever it is, NaN and infinities included.
    rewards = torch.where(weights == 0, 0.0, rewards)
    if estimator == "mean":
        q = (weights * rewards).sum(dim=-1)
        deviation = rewards - q.unsqueeze(-1)
    else:
        q = alpha * (weights.log() + rewards / alpha).logsumexp(dim=-1)
        deviation = alpha * torch.expm1((rewards - q.unsqueeze(-1)) / alpha)
    spread = torch.where(weights == 0, 0.0, weights * deviation).square().sum(dim=-1)
    num = lengths.to(torch.float64)
    correction = torch.where(num > 1, num / (num - 1), torch.nan)
    return torch.where(num > 0, q, torch.nan), (correction * spread).sqrt()


def _first_largest(scores: Tensor, token_ids: Tensor) -> Tensor:
    """Index `[G]` of the largest score of each row; of the lowest token id among equals."""
    is_largest = scores == scores.amax(dim=-1, keepdim=True)
    last = torch.iinfo(token_ids.dtype).max
    lowest = torch.where(is_largest, token_ids, last).amin(dim=-1, keepdim=True)
    return (is_largest & (token_ids == lowest)).to(torch.int8).argmax(dim=-1)


def _check(arguments: _Arguments) -> None:
    op = "reweight_sample"
    prior, ids, rewards, log_weights, lengths, *_, keys, _ = arguments
    optional = _checks.given(log_weights=log_weights, lengths=lengths, keys=keys)
    _checks.require_tensors(op, prior_logprobs=prior, token_ids=ids, rewards=rewards, **optional)
    _checks.require_dim(op, "prior_logprobs", prior, 2, "[G, k]")
    _checks.require_float(op, "prior_logprobs", prior)
    trees, k = prior.shape
    _checks.require_count(op, "k, the last axis of prior_logprobs,", k, 1, 2**31)
    _checks.require_shape(op, "token_ids", ids, (trees, k), "[G, k]")
    _checks.require_integer(op, "token_ids", ids)
    _checks.require_dim(op, "rewards", rewards, 3, "[G, k, n]")
    shape = (trees, k, rewards.shape[2])
    _checks.require_shape(op, "rewards", rewards, shape, "[G, k, n]")
    _checks.require_float(op, "rewards", rewards)
    if log_weights is not None:
        _checks.require_shape(op, "log_weights", log_weights, shape, "[G, k, n]")
        _checks.require_float(op, "log_weights", log_weights)
    if lengths is not None:
        _checks.require_shape(op, "lengths", lengths, (trees, k), "[G, k]")
        _checks.require_integer(op, "lengths", lengths)
    if keys is not None:
        _checks.require_shape(op, "keys", keys, (trees,), "[G]")
        _checks.require_integer(op, "keys", keys)
    if not _checks.is_number(arguments.alpha) or not 0 < arguments.alpha < float("inf"):
        value = _checks.describe(arguments.alpha)
        raise InvalidArgument(f"{op}: alpha is {value}, expected a number above 0")
    if not isinstance(arguments.estimator, str) or arguments.estimator not in _IS_SOFT:
        raise InvalidArgument(
            f'{op}: estimator is {arguments.estimator!r}, expected "mean" or "soft"'
        )
    if not isinstance(arguments.greedy, int) or arguments.greedy not in (0, 1):
        value = _checks.describe(arguments.greedy)
        raise InvalidArgument(f"{op}: greedy is {value}, expected True or False")
    _checks.require_int(op, "seed", arguments.seed, prior_logprobs=prior)
    _checks.require_int(op, "step", arguments.step, prior_logprobs=prior)
    _checks.refuse_grad(op, prior_logprobs=prior, rewards=rewards, log_weights=log_weights)


def _reference(arguments: _Arguments) -> ReweightedSample:
    return reweight_sample_ref(**arguments._asdict())


def reweight_sample_native(
    arguments: _Arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The C++ or CUDA kernel, by the device."""
    *tensors, alpha, estimator, greedy, seed, keys, step = arguments
    return torch.ops.tq_fast.reweight_sample.default(
        *tensors,
        alpha,
        _IS_SOFT[estimator],
        greedy,
        *philox.split_int64(seed),
        keys,
        *philox.split_int64(step),
    )


def _fake(prior_logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    trees, k = prior_logprobs.shape
    choice = prior_logprobs.new_empty((trees,), dtype=torch.int64)
    final_logprobs, q, q_stderr, ess = (
        prior_logprobs.new_empty((trees, k), dtype=torch.float32) for _ in range(4)
    )
    return choice, final_logprobs, q, q_stderr, ess


# Scores lie in shared memory, 8 bytes each, in the 32 KB that every GPU has.
_MOST_CUDA_CANDIDATES = 4096


def _refuse_cuda(arguments: _Arguments) -> str | None:
    k = arguments.prior_logprobs.shape[1]
    if k > _MOST_CUDA_CANDIDATES:
        return f"k is {k}; the kernel takes up to {_MOST_CUDA_CANDIDATES}"
    return _checks.refuse_other_device(arguments.prior_logprobs, **arguments._asdict())


_OP = Op(
    "reweight_sample",
    _reference,
    Backend(
        "cuda",
        native_function("reweight_sample", reweight_sample_native, _fake, "cuda"),
        _refuse_cuda,
    ),
    Backend("cpu", native_function("reweight_sample", reweight_sample_native, _fake)),
)
