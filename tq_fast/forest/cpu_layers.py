"""Linear layers, and whole decoder layers, on CPU when few rows go through them.

`x @ W.T` with a handful of rows costs what reading W costs, and torch's product reads it at a
fraction of the memory's speed. `ops.few_rows_linear` stands in for the layer's forward in a
forest's view of a model, for so many rows as it was measured to win (bench/test_few_rows.py). The
fused formula of a whole decoder layer, and of all layers in one call, stands in for any number of
rows: it takes the faster product itself. The weights are neither copied nor changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _native
from ..ops._checks import KERNEL_FLOATS
from ..ops._dispatch import unchecked_kernel
from .attention import attending
from .fused_layers import Forward, FusedLayers, fuse_layers, is_plain_linear
from .fused_stack import FusedStack, stack_layers

# The C++ kernel of `ops.few_rows_linear`.
NativeLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which `few_rows_linear` is the faster one on this processor; 0: never.

    Measured beside torch 2.13 on Zen 5, whole and with its instruction sets held down to AVX2, and
    on a Xeon with AMX.
    """
    if dtype not in KERNEL_FLOATS or _native.cpu_refusal() is not None:
        return 0
    return int(torch.ops.tq_fast.most_few_rows(torch.empty(0, dtype=dtype)))


class CpuLayers:
    """The layers of a forest's view, and what stands in for them in a pass of so many rows.

    Args:
        view: the forest's view of the model; layers of a class derived from `nn.Linear` are left
            alone.
        source: the model as the user has it.
        backend: as of an op: one other than cpu leaves every layer alone.
    """

    def __init__(self, view: nn.Module, source: nn.Module, backend: str | None = None) -> None:
        self._native: NativeLinear | None = unchecked_kernel("few_rows_linear", backend)
        self._linears: list[nn.Linear] = []
        self._fused: FusedLayers | None = None
        self._stack: FusedStack | None = None
        if self._native is not None:
            # A layer with a forward of its own, such as a hook's, keeps it.
            self._linears = [
                module
                for module in view.modules()
                if is_plain_linear(module) and "forward" not in module.__dict__
            ]
            self._fused = fuse_layers(view, source, backend)
            self._stack = stack_layers(view, source, self._fused, backend)
            for layer, forward, _ in self._fused.forwards:
                layer.__dict__["forward"] = forward
            if self._stack is not None:
                self._stack.base.__dict__["forward"] = self._stack.forward
            # What runs inside of a fused layer is not called by itself.
            inside = {part for layer, _, _ in self._fused.forwards for part in layer.modules()}
            self._linears = [linear for linear in self._linears if linear not in inside]
        self._stand_ins: dict[int, list[tuple[nn.Module, Forward]]] = {}
        self._installed: list[tuple[nn.Module, Forward]] = []

    def __str__(self) -> str:
        if self._fused is None:
            return "no decoder layer runs fused: the C++ library is not there, or not asked"
        return str(self._fused) + (", all of them in one call" if self._stack is not None else "")

    @property
    def taken(self) -> frozenset[nn.Module]:
        """Modules that something stands in for in some passes, and what those are made of."""
        fused = [module for module, _, _ in self._fused.forwards] if self._fused else []
        return frozenset(part for module in (*fused, *self._linears) for part in module.modules())

    def install(self, num_rows: int) -> None:
        """Have the layers compute, in passes of so many rows, in the way that pays."""
        stand_ins = self._stand_ins.get(num_rows)
        if stand_ins is None:
            stand_ins = self._stand_ins[num_rows] = self._choose(num_rows)
        if stand_ins is self._installed:
            return
        for layer, _ in self._installed:
            del layer.__dict__["forward"]
        for layer, stand_in in stand_ins:
            layer.__dict__["forward"] = stand_in
        self._installed = stand_ins

    def _choose(self, num_rows: int) -> list[tuple[nn.Module, Forward]]:
        if self._native is None:
            return []
        return [
            (layer, _native_forward(layer, self._native))
            for layer in self._linears
            if num_rows <= most_rows(layer.weight.dtype)
        ]


def describe_layers(model: PreTrainedModel) -> str:
    """Return how many decoder layers of `model` run fused on a CPU, and why the others do not."""
    return str(CpuLayers(attending(model), model, None))


def _native_forward(layer: nn.Linear, native: Forward) -> Forward:
    # Straight from the dict: `layer.weight` costs a search through the module for each call.
    parameters = layer._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None, "a linear layer has a weight"
        if x.dtype is not weight.dtype or x.dim() not in (2, 3):
            return nn.functional.linear(x, weight, bias)
        return native(x, weight, bias)

    return forward
