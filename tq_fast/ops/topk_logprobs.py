"""The k most likely tokens of each row, with their log-probabilities.

    y = logits[:, :vocab_size] / temperature
    ids = the k largest of y, by (value descending, id ascending)
    logprobs = y[ids] - logsumexp(y)

Bytes: the logits are read once, `N * V * itemsize`; the rest is k numbers a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._native import constant_when_compiling
from . import _checks
from ._checks import PerRow, split_per_row
from ._dispatch import Backend, Op, native_function, python_function


class TopKLogprobs(NamedTuple):
    """`ids` int64 `[N, k]`, `logprobs` fp32 `[N, k]`, `lse` fp32 `[N]`."""

    ids: Tensor
    logprobs: Tensor
    lse: Tensor


def topk_logprobs(
    logits: Tensor,
    k: int,
    *,
    temperature: PerRow = 1.0,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TopKLogprobs:
    """`torch.log_softmax(logits / temperature, -1).topk(k)`, ties to the lower id.

    Step 1 of Algorithm 1 of Transfer Q* (arXiv 2405.20495): the candidates.

    Args:
        logits: `[N, V]`, floating point; NaN counts as -inf.
        k: 1 to vocab_size.
        temperature: above 0; a number or `[N]`.
        vocab_size: columns from here on are padding and take no part.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        TopKLogprobs. A row without any finite logit has ids 0 .. k-1 and -inf everywhere. A row
        that holds +inf has no distribution: its lse and log-probs are not finite.

    Raises:
        InvalidArgument: wrong axes, dtype, k, temperature or vocab_size, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    _check(logits, k, temperature, vocab_size)
    result = _OP(backend, logits, k, temperature=temperature, vocab_size=vocab_size)
    return TopKLogprobs._make(result)


def topk_logprobs_ref(
    logits: Tensor, k: int, *, temperature: PerRow = 1.0, vocab_size: int | None = None
) -> TopKLogprobs:
    """The reference of `topk_logprobs`: plain PyTorch, fp32 inside."""
    values = clean_logits(logits, vocab_size) / _checks.as_column(temperature, torch.float32)
    ids = order_topk(values, k)
    log_norm, peak = shifted_logsumexp(values)
    logprobs = logprobs_at(values, ids, log_norm, peak)
    return TopKLogprobs(ids, logprobs, (peak + log_norm).squeeze(-1))


def clean_logits(logits: Tensor, vocab_size: int | None) -> Tensor:
    """The real columns of `[..., V]` logits in fp32, NaN as -inf; never writes its input."""
    values = logits[..., :vocab_size].to(torch.float32)
    return torch.nan_to_num(values, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def order_topk(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest of fp32 `[N, V]`, by (value descending, id ascending), int64 `[N, k]`.

    torch.topk leaves the order of ties open, so this sorts unique integer keys instead: the bits
    of the value made monotone in the high word, the id, descending, in the low one.
    """
    # Adding 0 turns -0.0 into +0.0: the two compare equal but their bits do not.
    bits = (values + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(values.shape[-1], device=values.device)
    keys = (ordered.to(torch.int64) << 32) | (0xFFFFFFFF - ids)
    return 0xFFFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def shifted_logsumexp(values: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp(values) - peak, peak), both `[..., 1]`; (-inf, 0) for a row of -inf.

    The two are kept apart because `value - peak - log_norm` keeps its digits where logits are
    huge, and is never above 0.
    """
    peak = values.amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    return (values - peak).exp().sum(dim=-1, keepdim=True).log(), peak


def logprobs_at(values: Tensor, ids: Tensor, log_norm: Tensor, peak: Tensor) -> Tensor:
    """log_softmax(values)[ids] `[..., k]` from `shifted_logsumexp`; -inf where the value is."""
    chosen = values.gather(-1, ids)
    return torch.where(chosen == -torch.inf, -torch.inf, chosen - peak - log_norm)


def _check(logits: Tensor, k: int, temperature: PerRow, vocab_size: int | None) -> None:
    name = "topk_logprobs"
    _checks.require_tensors(name, logits=logits)
    _checks.require_dim(name, "logits", logits, 2, "[N, V]")
    _checks.require_float(name, "logits", logits)
    _checks.refuse_grad(name, logits=logits)
    vocab_size = _checks.bound_vocab(name, logits, vocab_size)
    _checks.require_count(name, "k", k, 1, vocab_size)
    # A temperature of 0 has no log-probabilities.
    _checks.require_per_row(name, "temperature", temperature, logits, _checks.SMALLEST)


def topk_logprobs_native(
    logits: Tensor, k: int, *, temperature: PerRow = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ or CUDA kernel, by the device, with the arguments of the reference."""
    number, numbers = split_per_row(temperature)
    return torch.ops.tq_fast.topk_logprobs.default(
        logits, k, number, numbers, logits.size(-1) if vocab_size is None else vocab_size
    )


def _fake(
    logits: Tensor, k: int, temperature: float, temperatures: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((rows, k), dtype=torch.int64),
        logits.new_empty((rows, k), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.float32),
    )


# One block sorts the k best of 64 k candidates and holds a key of eight bytes for every 64 elements
# of a row: CUDA C++ in shared memory, Triton in registers.
_MOST_GPU_K = 128
_MOST_GPU_VOCAB = 2**19


def _refuse_gpu(
    logits: Tensor, k: int, *, temperature: PerRow = 1.0, vocab_size: int | None = None
) -> str | None:
    width = logits.shape[-1] if vocab_size is None else vocab_size
    if k > _MOST_GPU_K:
        return f"k is {k}; the kernel takes up to {_MOST_GPU_K}"
    if width > _MOST_GPU_VOCAB:
        return f"vocab_size is {width}; the kernel takes up to {_MOST_GPU_VOCAB}"
    return _checks.refuse_float64(logits=logits) or _checks.refuse_other_device(
        logits, temperature=temperature
    )


# What every card gives a block without being asked for more.
_SHARED_BYTES_OF_EVERY_CARD = 48 << 10


def shared_bytes(vocab_size: int, k: int) -> int:
    """The shared memory of a block of the CUDA kernel: `topk_shared_bytes` of cuda/topk_row.h."""
    tiles = -(-vocab_size // 2048)
    keys = 32 * tiles + min(vocab_size, 64 * k) + k
    return 8 * (keys + tiles) + 4 * (k + 2 * 32 + 2)


def refuse_shared_bytes(vocab_size: int, k: int, limit: int) -> str | None:
    """Say that these sizes want more shared memory than `limit` bytes; None when they do not."""
    needed = shared_bytes(vocab_size, k)
    if needed <= limit:
        return None
    return (
        f"k {k} of a vocabulary of {vocab_size} takes {needed} bytes of shared memory; this GPU "
        f"gives a block {limit}"
    )


@constant_when_compiling
def _shared_bytes_of(device: torch.device) -> int:
    """The bytes of shared memory that a block can have on `device`."""
    properties = torch.cuda.get_device_properties(device)
    # Where torch does not tell, it is what every card since compute capability 8.0 has.
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))


def _refuse_cuda(
    logits: Tensor, k: int, *, temperature: PerRow = 1.0, vocab_size: int | None = None
) -> str | None:
    reason = _refuse_gpu(logits, k, temperature=temperature, vocab_size=vocab_size)
    width = logits.shape[-1] if vocab_size is None else vocab_size
    # Usual sizes do not ask the card.
    if reason or refuse_shared_bytes(width, k, _SHARED_BYTES_OF_EVERY_CARD) is None:
        return reason
    return refuse_shared_bytes(width, k, _shared_bytes_of(logits.device))


def _refuse_cpu(logits: Tensor, k: int, **parameters: Any) -> str | None:
    return _checks.refuse_float64(logits=logits)


_OP = Op(
    "topk_logprobs",
    topk_logprobs_ref,
    Backend(
        "cuda",
        native_function("topk_logprobs", topk_logprobs_native, _fake, "cuda"),
        _refuse_cuda,
    ),
    Backend(
        "triton",
        python_function("tq_fast.kernels.topk_logprobs", "topk_logprobs_triton"),
        _refuse_gpu,
    ),
    Backend("cpu", native_function("topk_logprobs", topk_logprobs_native, _fake), _refuse_cpu),
)
