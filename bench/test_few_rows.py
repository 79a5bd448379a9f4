"""A linear layer on CPU with few rows: torch's product, the transposed one, and few_rows_linear.

The weights take turns and fill more memory than the caches hold, as they do in a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.ceilings import Work
from bench.side_by_side import time_provider
from tq_fast.ops import few_rows_linear, few_rows_linear_ref

_BYTES = 256 << 20
# Columns and outputs of a Llama of 134 M parameters: attention, gate and up, down, LM head.
SHAPES = [(768, 768), (768, 2048), (2048, 768), (768, 32000)]


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.t()).t().contiguous()


PROVIDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch": linear,
    "transposed": transposed,
    "ours": few_rows_linear,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("num_rows", [1, 4, 10, 20, 40, 200])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_few_rows(benchmark, figure, provider, num_rows, shape, dtype) -> None:
    size, columns = shape
    count = max(2, _BYTES // (size * columns * dtype.itemsize))
    weights = [torch.randn(columns, size).to(dtype) for _ in range(count)]
    x = torch.randn(num_rows, size).to(dtype)
    function = PROVIDERS[provider]
    with torch.inference_mode():
        expected = few_rows_linear_ref(x, weights[0])
        torch.testing.assert_close(function(x, weights[0]), expected, rtol=2e-2, atol=2e-2)
    time_provider(
        benchmark,
        figure,
        provider,
        f"few_rows_linear {num_rows}x{size} -> {columns} {dtype}",
        function,
        itertools.cycle([(x, weight) for weight in weights]),
        rounds=2 * count,
        warmup_rounds=count,
        work=Work(weights[0].nbytes, 2 * num_rows * size * columns),
        dtype=dtype,
    )
