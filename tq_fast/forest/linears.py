"""Linear layers that kernels may stand in for: plain ones, and those with int8 weights.

An int8 weight is int8 numbers and a scale for each output.

Quantisers keep such a weight as a subclass of tensors. Its int8 numbers and scales are found among
the tensors that it is made of, whatever they are called there, and `ops.few_rows_linear` over them
is tried against the layer's own product on a few rows. A layer that disagrees (its activations are
quantised too, its range is not symmetric, its numbers are packed otherwise) runs as it is. The
numbers are multiplied where they lie: no copy in another dtype is kept.

torchao 0.18 rounds three times to the dtype of x: the sums, the scales, and the scaled sums (and a
fourth time with a bias); `few_rows_linear` rounds once. In bf16 the two differ by up to four halves
of a spacing, 2^-6 of a number, and the one that rounds once is the nearer to the product of the
dequantised weights. In fp32 they differ as sums in another order do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..ops import few_rows_linear
from .trials import is_close


class Int8Weight(NamedTuple):
    """Numbers `[O, D]`, int8, and scales `[O]`, fp32, of a linear layer's weight."""

    numbers: Tensor
    scale: Tensor


# Weight and bias of a linear layer, and the scale where the weight is int8.
Operands = tuple[Tensor, Tensor | None, Tensor | None]

# The C++ kernel of `ops.few_rows_linear`.
NativeLinear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]

# What was found in a weight; None: its layer does not multiply it as `few_rows_linear` does.
_tried: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer itself, none derived from it, its weights on the CPU."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
    )


def is_int8_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether `module` multiplies int8 weights on the CPU as `few_rows_linear` does, by a trial."""
    return has_int8_weight(module) and _int8_weight(module) is not None


def has_int8_weight(module: object) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer whose weight is made of int8 numbers and scales."""
    return type(module) is nn.Linear and _read(module.weight) is not None


def operands_of(layer: nn.Linear) -> Callable[[], Operands]:
    """Return what reads the operands of `layer`, plain or int8, as they are at each call.

    A weight that is replaced later is the one that is read then.
    """
    # Straight from the dict: `layer.weight` costs a search through the module for each call.
    parameters = layer._parameters
    if is_plain_linear(layer):

        def read_plain() -> Operands:
            weight = parameters["weight"]
            assert weight is not None, "a linear layer has a weight"
            return weight, parameters["bias"], None

        return read_plain

    known, found = layer.weight, _int8_weight(layer)

    def read_int8() -> Operands:
        nonlocal known, found
        if parameters["weight"] is not known:
            known, found = layer.weight, _int8_weight(layer)
        assert found is not None, "the weight is one that was tried"
        return found.numbers, parameters["bias"], found.scale

    return read_int8


def product_forward(layer: nn.Linear, native: NativeLinear) -> Callable[[Tensor], Tensor]:
    """Return a forward of `layer` by the kernel, for rows `[N, D]` or `[N, T, D]` of its dtype."""
    operands = operands_of(layer)
    # Straight from the dict: `layer.weight` costs a search through the module for each call.
    parameters = layer._parameters

    def forward(x: Tensor) -> Tensor:
        weight = parameters["weight"]
        assert weight is not None, "a linear layer has a weight"
        if x.dtype is not weight.dtype or x.dim() not in (2, 3):
            return nn.functional.linear(x, weight, parameters["bias"])
        return native(x, *operands())

    return forward


def _int8_weight(layer: nn.Linear) -> Int8Weight | None:
    """The int8 weight of `layer`, if the product with it is what the layer computes."""
    weight = layer.weight
    if weight not in _tried:
        found = _read(weight)
        _tried[weight] = found if found is not None and _agrees(layer, found) else None
    return _tried[weight]


def _read(weight: Tensor) -> Int8Weight | None:
    """Find int8 numbers of the shape of `weight`, and as many scales as it has outputs, or one."""
    if weight.dim() != 2 or weight.device.type != "cpu":
        return None
    parts = list(_parts(weight))
    numbers = [part for part in parts if part.dtype is torch.int8 and part.shape == weight.shape]
    scales = [
        part for part in parts if part.is_floating_point() and part.numel() in (1, weight.shape[0])
    ]
    if len(numbers) != 1 or len(scales) != 1:
        return None
    scale = scales[0].detach().flatten().float()
    return Int8Weight(numbers[0].detach(), scale.expand(weight.shape[0]).contiguous())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a subclass is made of, by the protocol that torch.compile asks too."""
    if type(tensor) in (Tensor, nn.Parameter):
        return
    flatten: Callable[[], tuple[list[str], object]] | None
    flatten = getattr(tensor, "__tensor_flatten__", None)
    for name in () if flatten is None else flatten()[0]:
        part = getattr(tensor, name)
        if type(part) is Tensor:
            yield part
        else:
            yield from _parts(part)


@torch.no_grad()
def _agrees(layer: nn.Linear, found: Int8Weight) -> bool:
    """Whether the product with `found` is what the layer computes, on four rows."""
    size = layer.weight.shape[1]
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    # Beside a number that is much larger than the others, those would be lost if x were quantised.
    x[1, size // 2] = 4 * size**0.5
    x[2] *= 0.05
    x[3] *= 2
    x = x.to(layer.weight.dtype)
    try:
        truth = nn.functional.linear(x, layer.weight, layer.bias)
    except Exception:
        # A weight that cannot be multiplied so is of another kind, whatever it raises.
        return False
    ours = few_rows_linear(x, found.numbers, layer.bias, found.scale, backend="ref")
    return is_close(ours, truth)
