"""Linear layers on CPU when few rows go through them.

`x @ W.T` with a handful of rows is read in an order that leaves most of the memory's speed unused;
`(W @ x.T).T`, the same product, is not: measured 1.1 to 2.3 times as fast for 5 to 40 rows in fp32
and 1.4 to 1.9 times for 2 to 80 rows in bf16 (bench/test_few_rows.py). The weights are neither
copied nor changed, and the layers are as they were after the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# Rows (first and last) for which the transposed product wins, by dtype.
_ROWS = {
    torch.float32: (5, 40),
    torch.bfloat16: (2, 80),
    torch.float16: (2, 80),
}


class _TransposedLinear:
    """Stands in for the `forward` of one `nn.Linear`."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        product = (weight @ x.reshape(-1, x.shape[-1]).t()).t().contiguous()
        if bias is not None:
            product += bias
        return product.view(*x.shape[:-1], weight.shape[0])


class FewRows:
    """The linear layers of a model, and whether a pass of so many rows is better transposed."""

    def __init__(self, model: nn.Module) -> None:
        self._stand_ins = [
            (module, _TransposedLinear(module))
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype in _ROWS
        ]

    @contextlib.contextmanager
    def during(self, num_rows: int) -> Iterator[None]:
        """Within the block, layers for which it pays multiply the transposed way."""
        changed = []
        for layer, stand_in in self._stand_ins:
            first, last = _ROWS[layer.weight.dtype]
            if first <= num_rows <= last and "forward" not in layer.__dict__:
                layer.__dict__["forward"] = stand_in
                changed.append(layer)
        try:
            yield
        finally:
            for layer in changed:
                del layer.__dict__["forward"]
