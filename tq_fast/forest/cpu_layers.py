"""Linear layers, and whole decoder layers, on CPU when few rows go through them.

`x @ W.T` with a handful of rows costs what reading W costs, and torch's product reads it at a
fraction of the memory's speed. `ops.few_rows_linear` stands in for the layer's forward in a
forest's view of a model, for so many rows as it was measured to win (bench/test_few_rows.py). The
fused formula of a whole decoder layer, and of all layers in one call, stands in for any number of
rows: it takes the faster product itself. The weights are neither copied nor changed; those that a
quantiser left as int8 numbers and a scale for each output (`linears.py`) are multiplied as int8,
which reads half the bytes of bf16.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _native
from ..errors import warn_caller
from ..ops._checks import KERNEL_FLOATS
from ..ops._dispatch import unchecked_kernel
from .attention import attending
from .fused_layers import Forward, FusedLayers, fuse_layers
from .fused_stack import FusedStack, stack_layers
from .linears import (
    NativeLinear,
    has_int8_weight,
    is_int8_linear,
    is_plain_linear,
    product_forward,
)

# Models of which it was told that int8 weights run as they are.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which `few_rows_linear` is the faster one on this processor; 0: never.

    Measured beside torch 2.13 on Zen 5, whole and with its instruction sets held down to AVX2, and
    on a Xeon with AMX.

    Args:
        dtype: that of the weights; int8 beside rows of any dtype.
    """
    if dtype not in KERNEL_FLOATS | {torch.int8} or _native.cpu_refusal() is not None:
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
        # Linear layers that may run in the kernel, and the dtype of their weights.
        self._linears: list[tuple[nn.Linear, torch.dtype]] = []
        self._num_int8 = self._num_other_int8 = 0
        self._fused: FusedLayers | None = None
        self._stack: FusedStack | None = None
        if self._native is not None:
            for module in view.modules():
                # A layer with a forward of its own, such as a hook's, keeps it.
                if "forward" in module.__dict__:
                    continue
                if is_plain_linear(module):
                    self._linears.append((module, module.weight.dtype))
                elif is_int8_linear(module):
                    self._linears.append((module, torch.int8))
                elif has_int8_weight(module):
                    self._num_other_int8 += 1
            self._fused = fuse_layers(view, source, backend)
            self._num_int8 = sum(dtype is torch.int8 for _, dtype in self._linears)
            if self._num_other_int8 > 0 and source not in _warned:
                _warned.add(source)
                warn_caller(f"{type(source).__name__}: {self._int8_linears()}")
            self._stack = stack_layers(view, source, self._fused, backend)
            for layer, forward in self._fused.forwards:
                layer.__dict__["forward"] = forward
            if self._stack is not None:
                self._stack.base.__dict__["forward"] = self._stack.forward
            # What runs inside of a fused layer is not called by itself.
            inside = {part for layer, _ in self._fused.forwards for part in layer.modules()}
            self._linears = [known for known in self._linears if known[0] not in inside]
        self._stand_ins: dict[int, list[tuple[nn.Module, Forward]]] = {}
        self._installed: list[tuple[nn.Module, Forward]] = []

    def __str__(self) -> str:
        if self._fused is None:
            return "no decoder layer runs fused: the C++ library is not there, or not asked"
        text = str(self._fused) + (", all of them in one call" if self._stack is not None else "")
        int8_linears = self._int8_linears()
        return f"{text}; {int8_linears}" if int8_linears else text

    def _int8_linears(self) -> str:
        """Say how many linear layers with int8 weights run in the kernel; "" where none has any."""
        total = self._num_int8 + self._num_other_int8
        if total == 0:
            return ""
        count = f"{self._num_int8} of {total}"
        text = f"{count} linear layers with int8 weights run in the kernel for few rows"
        if self._num_other_int8 == 0:
            return text
        return f"{text}, the others, which compute another product by a trial, as they are"

    @property
    def taken(self) -> frozenset[nn.Module]:
        """Modules that something stands in for in some passes, and what those are made of."""
        fused = [module for module, _ in self._fused.forwards] if self._fused else []
        linears = [module for module, _ in self._linears]
        return frozenset(part for module in (*fused, *linears) for part in module.modules())

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
            (layer, product_forward(layer, self._native))
            for layer, dtype in self._linears
            if num_rows <= most_rows(dtype)
        ]


def describe_layers(model: PreTrainedModel) -> str:
    """Return how many decoder layers of `model` run fused on a CPU, and why the others do not."""
    return str(CpuLayers(attending(model), model, None))
