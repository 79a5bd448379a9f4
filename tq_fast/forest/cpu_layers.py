"""Linear layers, and whole decoder layers, on CPU when few rows go through them.

`x @ W.T` with a handful of rows costs what reading W costs, and torch's product reads it at a
fraction of the memory's speed. `ops.few_rows_linear` stands in for the layer's forward in a
forest's view of a model, for so many rows as it was measured to win (bench/test_few_rows.py); so
does the fused formula of a whole decoder layer. The weights are neither copied nor changed; those
that a quantiser left as int8 numbers and a scale for each output (`linears.py`) are multiplied as
int8, which reads half the bytes of bf16.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _native
from ..errors import warn_caller
from ..ops._dispatch import unchecked_kernel
from .attention import attending
from .fused_layers import Forward, FusedLayers, fuse_layers
from .linears import has_int8_weight, is_int8_linear, is_plain_linear, operands_of

# The C++ kernel of `ops.few_rows_linear`.
NativeLinear = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
# Models of which it was told that int8 weights run as they are.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


# A quantiser's own product first makes a copy of the weights in the dtype of the rows.
MOST_ROWS_OF_INT8 = 64


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which `few_rows_linear` is the faster one on this processor; 0: never.

    Measured beside torch 2.13 on Zen 5, whole and with its instruction sets held down to AVX2, and
    on a Xeon with AMX.

    Args:
        dtype: that of the weights; int8 beside rows of any dtype.
    """
    isa = _native.cpu_isa()
    kinds = torch.float32, torch.bfloat16, torch.float16, torch.int8
    if dtype not in kinds or isa in (None, "base"):
        return 0
    if dtype is torch.int8:
        return MOST_ROWS_OF_INT8
    if isa == "avx2":
        return 24 if dtype is torch.float32 else 64
    if dtype is torch.bfloat16:
        # Beyond that, oneDNN's product makes up for all else.
        return 256 if _native.cpu_has("amx") or _native.cpu_has("avx512_bf16") else 64
    if _native.cpu_has("amd"):
        # MKL makes half of what AMD's processors can do with fp32, whatever the number of rows, and
        # there is no library for fp16.
        return 4096
    return 40 if dtype is torch.float32 else 16


def most_rows_of_a_layer(dtype: torch.dtype) -> int:
    """Rows up to which a whole decoder layer is faster as `fused_layers` runs it; 0: never.

    Measured with bf16 on Zen 5: what is saved between the products outweighs all that oneDNN is
    ahead in them.
    """
    rows = most_rows(dtype)
    is_ahead = (
        rows > 0
        and dtype is not torch.int8
        and _native.cpu_isa() == "avx512"
        and _native.cpu_has("amd")
    )
    return max(rows, 4096) if is_ahead else rows


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
        self._num_other_int8 = 0
        self._fused: FusedLayers | None = None
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
            if self._num_other_int8 > 0 and source not in _warned:
                _warned.add(source)
                warn_caller(f"{type(source).__name__}: {self._int8_linears()}")
        self._stand_ins: dict[int, list[tuple[nn.Module, Forward]]] = {}
        self._installed: list[tuple[nn.Module, Forward]] = []

    def __str__(self) -> str:
        if self._fused is None:
            return "no decoder layer runs fused: the C++ library is not there, or not asked"
        int8_linears = self._int8_linears()
        return f"{self._fused}; {int8_linears}" if int8_linears else str(self._fused)

    def _int8_linears(self) -> str:
        """Say how many linear layers with int8 weights run in the kernel; "" where none has any."""
        count = sum(dtype is torch.int8 for _, dtype in self._linears)
        total = count + self._num_other_int8
        if total == 0:
            return ""
        text = f"{count} of {total} linear layers with int8 weights run in the kernel for few rows"
        if count == total:
            return text
        return f"{text}, the others, which compute another product by a trial, as they are"

    @property
    def taken(self) -> frozenset[nn.Module]:
        """Modules that something stands in for in some passes, and what those are made of."""
        fused = [module for module, _, _ in self._fused.forwards] if self._fused else []
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
        if self._native is None or self._fused is None:
            return []
        chosen = [
            (module, forward)
            for module, forward, dtype in self._fused.forwards
            if num_rows <= most_rows_of_a_layer(dtype)
        ]
        inside = {part for module, _ in chosen for part in module.modules()}
        for layer, dtype in self._linears:
            if layer in inside:
                continue
            if num_rows <= most_rows(dtype):
                chosen.append((layer, _native_forward(layer, self._native)))
        return chosen


def describe_layers(model: PreTrainedModel) -> str:
    """Return how many decoder layers of `model` run fused on a CPU, and why the others do not."""
    return str(CpuLayers(attending(model), model, None))


def _native_forward(layer: nn.Linear, native: Forward) -> Forward:
    operands = operands_of(layer)
    # Straight from the dict: `layer.weight` costs a search through the module for each call.
    parameters = layer._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = parameters["weight"]
        assert weight is not None, "a linear layer has a weight"
        if x.dtype is not weight.dtype or x.dim() not in (2, 3):
            return nn.functional.linear(x, weight, parameters["bias"])
        return native(x, *operands())

    return forward
