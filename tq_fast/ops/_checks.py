"""Checks of what a caller passes to an op: kinds, shapes, dtypes, devices and plain numbers.

The values in a tensor are not looked at: that would wait for the device. Messages name the op, the
argument, what came and what was expected.
"""

from __future__ import annotations

import numbers
import reprlib
from typing import TypeGuard

import torch
from torch import Tensor

from ..errors import InvalidArgument

PerRow = float | int | Tensor

# The dtypes that kernels compute from; the references take fp64 too.
KERNEL_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
FLOATS = KERNEL_FLOATS | {torch.float64}
INTEGERS = frozenset({torch.int64, torch.int32})
# The range of the numbers that kernels can use, since they compute in fp32.
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
# The largest int that a C++ schema takes.
LARGEST_COUNT = 2**63 - 1
_INTS = (int, numbers.Integral, torch.SymInt)
_NUMBERS = (int, float, numbers.Real, torch.SymInt, torch.SymFloat)


def describe(value: object) -> str:
    """Describe `value` for a message; a tensor is not read."""
    return f"a tensor of shape {list(value.shape)}" if is_tensor(value) else reprlib.repr(value)


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of rows that a kernel can read, neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def require_tensors(op: str, **tensors: object) -> None:
    """Raise InvalidArgument unless all are strided tensors on the device of the first."""
    first_name = ""
    device: torch.device | None = None
    for name, value in tensors.items():
        if not is_tensor(value):
            kind = f"a {value.layout} tensor" if isinstance(value, Tensor) else describe(value)
            raise InvalidArgument(f"{op}: {name} is {kind}, expected a strided tensor")
        if device is None:
            first_name, device = name, value.device
        elif value.device != device:
            raise InvalidArgument(
                f"{op}: {name} is on {value.device}, expected {device}, where {first_name} is"
            )


def require_apart(op: str, **tensors: Tensor) -> None:
    """Raise InvalidArgument if two elements of a tensor that is written to share their memory."""
    for name, tensor in tensors.items():
        if any(
            stride == 0 < size - 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise InvalidArgument(
                f"{op}: {name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}, "
                "expected elements apart in memory: it is written to"
            )


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The optional tensors that are not None, by name."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


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


def require_within(op: str, name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise InvalidArgument for an element outside of [low, high].

    Elements are read on the CPU only, where that waits for no device, and not while a graph is
    traced.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or not tensor.is_cpu:
        return
    for idx, value in enumerate(tensor.tolist()):
        if not low <= value <= high:
            raise InvalidArgument(f"{op}: {name}[{idx}] is {value}, expected {low} to {high}")


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
    if not isinstance(vocab_size, _INTS) or not 1 <= vocab_size <= width:
        raise InvalidArgument(
            f"{op}: vocab_size is {describe(vocab_size)}, expected 1 to {width}, "
            f"the last axis of {name}"
        )
    return vocab_size


def require_per_row(
    op: str,
    name: str,
    value: PerRow,
    first: Tensor,
    low: float,
    high: float = float("inf"),
    is_count: bool = False,
) -> None:
    """Raise unless `value` is a number in [low, high], or a 1-D tensor of one a row of `first`.

    With `is_count` it is an integer.
    """
    if not isinstance(value, Tensor):
        kinds = _INTS if is_count else _NUMBERS
        if not isinstance(value, kinds) or not low <= value <= high:
            raise InvalidArgument(
                f"{op}: {name} is {describe(value)}, expected {low:g} to {high:g}"
            )
        return
    require_tensors(op, logits=first, **{name: value})
    require_shape(op, name, value, (first.shape[0],), "[N]")
    if is_count:
        require_integer(op, name, value)
    elif value.dtype not in FLOATS and value.dtype not in INTEGERS:
        raise InvalidArgument(f"{op}: {name} is {value.dtype}, expected a tensor of numbers")
    refuse_grad(op, **{name: value})


def is_number(value: object) -> bool:
    """Whether `value` is a plain number, of Python, numpy or a graph that is being traced."""
    return isinstance(value, _NUMBERS)


def require_number(op: str, name: str, value: float, low: float = -LARGEST) -> None:
    """Raise InvalidArgument unless `value` is a finite number of fp32, `low` or above."""
    if not isinstance(value, _NUMBERS) or not low <= value <= LARGEST:
        raise InvalidArgument(
            f"{op}: {name} is {describe(value)}, expected a number from {low:g} to {LARGEST:g}"
        )


def require_softcap(op: str, softcap: float | None) -> None:
    """Raise InvalidArgument unless `softcap` is None, or a number above 0 that fp32 can hold."""
    if softcap is None or (isinstance(softcap, _NUMBERS) and SMALLEST <= softcap <= LARGEST):
        return
    raise InvalidArgument(
        f"{op}: softcap is {describe(softcap)}, expected a number above 0, of at most {LARGEST:g}"
    )


def require_int(op: str, name: str, value: int | Tensor, **first: Tensor) -> None:
    """Raise unless `value` is an int or a one-element integer tensor on the device of `first`."""
    if isinstance(value, Tensor):
        require_tensors(op, **first, **{name: value})
        require_integer(op, name, value)
        if value.numel() == 1:
            return
    elif isinstance(value, _INTS):
        return
    raise InvalidArgument(
        f"{op}: {name} is {describe(value)}, expected an int or a tensor of one element"
    )


def as_column(value: PerRow, dtype: torch.dtype) -> PerRow:
    """A per-row parameter ready to broadcast against `[N, ...]` rows: a number, or `[N, 1]`."""
    return value.to(dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def require_count(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raise InvalidArgument unless `value` is an integer in [low, high]."""
    if not isinstance(value, _INTS) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{op}: {name} is {describe(value)}, expected {low} to {high}")


def require_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise InvalidArgument unless `tensor` has exactly this dtype."""
    if tensor.dtype != dtype:
        raise InvalidArgument(f"{op}: {name} is {tensor.dtype}, expected {dtype}")


def split_per_row(value: PerRow) -> tuple[float | int, Tensor | None]:
    """A per-row parameter as the pair that a C++ schema takes: a number, or a tensor beside 0."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


def refuse_float64(**tensors: Tensor | None) -> str | None:
    """The refusal of the kernels, which take fp32, bf16 and fp16 only; None when they do."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64; the kernel takes float32, bfloat16 and float16"
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
    linear: tuple[Tensor | None, ...],
    size_in: int,
    size_out: int | None = None,
) -> dict[str, Tensor]:
    """Raise unless `linear` is weight, bias and perhaps scale of a layer of these sizes.

    Returns:
        Its tensors by name.
    """
    if not isinstance(linear, tuple) or len(linear) not in (2, 3):
        raise InvalidArgument(
            f"{op}: {name}_linear is {describe(linear)}, expected (weight, bias) or "
            "(weight, bias, scale)"
        )
    weight = linear[0]
    require_tensors(op, **{f"{name}_weight": weight})
    assert weight is not None, "a weight is a tensor"
    require_dim(op, f"{name}_weight", weight, 2, "[out, in]")
    shape = (weight.shape[0] if size_out is None else size_out, size_in)
    require_shape(op, f"{name}_weight", weight, shape, "[out, in]")
    tensors = {f"{name}_weight": weight}
    for part, tensor in zip(("bias", "scale"), linear[1:], strict=False):
        if tensor is not None:
            tensors[f"{name}_{part}"] = tensor
            require_tensors(op, **tensors)
            require_shape(op, f"{name}_{part}", tensor, (weight.shape[0],), "[out]")
    return tensors


def require_weight(
    op: str, prefix: str, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise unless `weight` has this dtype, or is int8 and has an fp32 `scale` of each output."""
    name = f"{prefix}weight"
    if scale is None:
        if weight.dtype is torch.int8:
            raise InvalidArgument(f"{op}: {name} is torch.int8 and there is no {prefix}scale")
        return require_dtype(op, name, weight, dtype)
    require_shape(op, f"{prefix}scale", scale, (weight.shape[0],), "[O]")
    require_dtype(op, f"{prefix}scale", scale, torch.float32)
    if weight.dtype is not torch.int8:
        raise InvalidArgument(
            f"{op}: {name} is {weight.dtype} and has a {prefix}scale, expected torch.int8"
        )
    return None


def require_dtypes_of_layer(op: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise unless the tensors of a decoder layer have this dtype, but for int8 weights."""
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition("_")
        scale = tensors.get(f"{prefix}_scale")
        if part == "weight":
            require_weight(op, f"{prefix}_", tensor, scale, dtype)
        elif part != "scale":
            require_dtype(op, name, tensor, dtype)


def require_heads(op: str, name: str, weight: Tensor, head_size: int) -> None:
    """Raise InvalidArgument unless the outputs of `weight` are whole heads of an even size."""
    if head_size < 2 or head_size % 2 or weight.shape[0] % head_size:
        raise InvalidArgument(
            f"{op}: {name} has shape {list(weight.shape)}, expected outputs in heads of an even "
            f"size, that of cos: {head_size}"
        )
