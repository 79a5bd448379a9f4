"""Weights of int8 numbers as quantisers make them: a subclass of tensors that multiplies itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Int8Weight(Tensor):
    """Numbers and scales in a tensor of another dtype; its product is rounded as torchao's is."""

    numbers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Weight:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=dtype)

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.numbers, self.scales = numbers, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scales"], None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            return args[1].multiply_rows(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scales, args[0].dtype)
        raise NotImplementedError(func)

    def multiply_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = nn.functional.linear(x, self.numbers.to(x.dtype)) * self.scales.to(x.dtype)
        return product if bias is None else product + bias


class WithInt8Rows(Int8Weight):
    """Rounds the rows to int8 numbers too, as dynamic quantisation does."""

    def multiply_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().multiply_rows((x / step).round() * step, weight, bias)


def quantise(layer: nn.Linear, kind: type[Int8Weight] = Int8Weight) -> None:
    """Replace the weight of `layer` by int8 numbers and a scale for each output."""
    weight = layer.weight.detach().float()
    scales = weight.abs().amax(1) / 127
    numbers = (weight / scales[:, None]).round().to(torch.int8)
    made = kind(numbers, scales, layer.weight.dtype)
    layer.weight = nn.Parameter(made, requires_grad=False)


def quantise_all(model: nn.Module, kind: type[Int8Weight] = Int8Weight) -> None:
    """Replace the weights of every linear layer of `model`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            quantise(module, kind)
