"""Checks of what a caller passes to an op: shapes, dtypes and devices only, never values.

Messages name the op, the argument, what came and what was expected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument

PerRow = float | int | Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTEGERS = frozenset({torch.int64, torch.int32})


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise InvalidArgument unless `tensor` has this shape; `axes` spells it, such as "[N, V]"."""
    if tensor.shape != shape:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(tensor.shape)}, expected {axes} = {list(shape)}"
        )


def require_dim(op: str, name: str, tensor: Tensor, num_axes: int, axes: str) -> None:
    """Raise InvalidArgument unless `tensor` has `num_axes` axes."""
    if tensor.dim() != num_axes:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(tensor.shape)}, expected {num_axes} axes, {axes}"
        )


def require_float(op: str, name: str, tensor: Tensor) -> None:
    """Raise InvalidArgument unless `tensor` is fp32, bf16, fp16 or fp64."""
    if tensor.dtype not in FLOATS:
        raise InvalidArgument(f"{op}: {name} is {tensor.dtype}, expected a floating-point tensor")


def require_integer(op: str, name: str, tensor: Tensor) -> None:
    """Raise InvalidArgument unless `tensor` is int64 or int32."""
    if tensor.dtype not in INTEGERS:
        raise InvalidArgument(
            f"{op}: {name} is {tensor.dtype}, expected torch.int64 or torch.int32"
        )


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise InvalidArgument for an input that autograd would have to follow."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise InvalidArgument(
                f"{op}: {name} requires grad and the op has no backward; "
                "detach it or call under torch.no_grad()"
            )


def bound_vocab(op: str, logits: Tensor, vocab_size: int | None, name: str = "logits") -> int:
    """The number of real tokens in the last axis of `logits`, its padding excluded."""
    width = logits.shape[-1]
    if vocab_size is None:
        vocab_size = width
    if not 1 <= vocab_size <= width:
        raise InvalidArgument(
            f"{op}: vocab_size is {vocab_size}, expected 1 to {width}, the last axis of {name}"
        )
    return vocab_size


def require_per_row(
    op: str, name: str, value: PerRow, rows: int, low: float, high: float = float("inf")
) -> None:
    """Raise unless `value` is a number in [low, high] or a 1-D tensor of `rows` numbers.

    The values of a tensor are not looked at: that would wait for the device.
    """
    if isinstance(value, Tensor):
        require_shape(op, name, value, (rows,), "[N]")
    elif not low <= value <= high:
        raise InvalidArgument(f"{op}: {name} is {value}, expected {low:g} to {high:g}")


def as_column(value: PerRow, dtype: torch.dtype) -> PerRow:
    """A per-row parameter ready to broadcast against `[N, ...]` rows: a number, or `[N, 1]`."""
    return value.to(dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def require_count(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raise InvalidArgument unless `low` <= `value` <= `high`."""
    if not low <= value <= high:
        raise InvalidArgument(f"{op}: {name} is {value}, expected {low} to {high}")


def require_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise InvalidArgument unless `tensor` has exactly this dtype."""
    if tensor.dtype != dtype:
        raise InvalidArgument(f"{op}: {name} is {tensor.dtype}, expected {dtype}")


def split_per_row(value: PerRow) -> tuple[float | int, Tensor | None]:
    """A per-row parameter as the pair that a C++ schema takes: a number, or a tensor beside 0."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


def refuse_float64(**tensors: Tensor | None) -> str | None:
    """The refusal of the C++ kernels, which take fp32, bf16 and fp16 only; None when they do."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64; the C++ kernel takes float32, bfloat16 and float16"
    return None


def refuse_other_device(first: Tensor, **others: object) -> str | None:
    """The refusal of a CUDA kernel that would read memory of another device; None when it can."""
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != first.device:
            return f"{name} is on {other.device}, the first tensor on {first.device}"
    return None


def require_linear(
    op: str,
    name: str,
    linear: tuple[Tensor, Tensor | None],
    size_in: int,
    size_out: int | None = None,
) -> dict[str, Tensor]:
    """Raise unless `linear` is weight and bias of a layer of these sizes; its tensors by name."""
    weight, bias = linear
    require_dim(op, f"{name}_weight", weight, 2, "[out, in]")
    shape = (weight.shape[0] if size_out is None else size_out, size_in)
    require_shape(op, f"{name}_weight", weight, shape, "[out, in]")
    if bias is None:
        return {f"{name}_weight": weight}
    require_shape(op, f"{name}_bias", bias, (weight.shape[0],), "[out]")
    return {f"{name}_weight": weight, f"{name}_bias": bias}


def require_heads(op: str, name: str, weight: Tensor, head_size: int) -> None:
    """Raise InvalidArgument unless the outputs of `weight` are whole heads of an even size."""
    if head_size < 2 or head_size % 2 or weight.shape[0] % head_size:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(weight.shape)}, expected outputs in heads of an even "
            f"size, that of cos: {head_size}"
        )
