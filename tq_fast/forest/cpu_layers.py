"""Linear layers, and whole decoder layers, on CPU when few rows go through them.

`x @ W.T` with a handful of rows costs what reading W costs, and torch's product reads it at a
fraction of the memory's speed. `ops.few_rows_linear` stands in for the layer's forward in a
forest's view of a model, for so many rows as it was measured to win (bench/test_few_rows.py); so
does the fused formula of a whole decoder layer. The weights are neither copied nor changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _native
from ..ops._dispatch import unchecked_kernel
from .attention import attending
from .fused_layers import Forward, FusedLayers, fuse_layers, is_plain_linear

# The C++ kernel of `ops.few_rows_linear`.
NativeLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which `few_rows_linear` is the faster one on this processor; 0: never.

    Measured beside torch 2.13 on Zen 5, whole and with its instruction sets held down to AVX2, and
    on a Xeon with AMX.
    """
    isa = _native.cpu_isa()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or isa in (None, "base"):
        return 0
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
    is_ahead = rows > 0 and _native.cpu_isa() == "avx512" and _native.cpu_has("amd")
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
        self._linears: list[nn.Linear] = []
        self._fused: FusedLayers | None = None
        if self._native is not None:
            # A layer with a forward of its own, such as a hook's, keeps it.
            self._linears = [
                module
                for module in view.modules()
                if is_plain_linear(module) and "forward" not in module.__dict__
            ]
            self._fused = fuse_layers(view, source, backend)
        self._stand_ins: dict[int, list[tuple[nn.Module, Forward]]] = {}
        self._installed: list[tuple[nn.Module, Forward]] = []

    def __str__(self) -> str:
        if self._fused is None:
            return "no decoder layer runs fused: the C++ library is not there, or not asked"
        return str(self._fused)

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
        if self._native is None or self._fused is None:
            return []
        chosen = [
            (module, forward)
            for module, forward, dtype in self._fused.forwards
            if num_rows <= most_rows_of_a_layer(dtype)
        ]
        inside = {part for module, _ in chosen for part in module.modules()}
        for layer in self._linears:
            if layer in inside:
                continue
            if num_rows <= most_rows(layer.weight.dtype):
                chosen.append((layer, _native_forward(layer, self._native)))
        return chosen


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
