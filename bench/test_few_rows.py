"""A linear layer on CPU with few rows: the usual product beside the transposed one.

The weights rotate through more memory than the caches hold, as they do in a model.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tq_fast.models.few_rows import FewRows

_BYTES = 256 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [2, 5, 10, 20, 40, 80])
@pytest.mark.parametrize("provider", ["eager", "ours"])
def test_few_rows(benchmark, provider, num_rows, dtype) -> None:
    size, columns = 768, 2048
    count = _BYTES // (size * columns * dtype.itemsize)
    layers = [nn.Linear(size, columns, bias=False, dtype=dtype) for _ in range(count)]
    x = torch.randn(num_rows, size).to(dtype)
    with torch.inference_mode():
        expected = layers[0](x)
        rows = num_rows if provider == "ours" else 0
        with FewRows(nn.ModuleList(layers)).during(rows):
            torch.testing.assert_close(layers[0](x), expected, rtol=2e-2, atol=2e-2)
            turn = itertools.cycle(layers)
            benchmark.group = f"linear {num_rows}x{size} -> {columns} {dtype}"
            benchmark.pedantic(lambda: next(turn)(x), rounds=60, warmup_rounds=5)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = layers[0].weight.nbytes / seconds / 1e9
