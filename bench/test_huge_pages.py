"""The weights of a layer read from huge pages, and from pages as the system gives them.

The same layers are timed one after the other in one run: as they are, and with weights that were
gathered as a forest does it for a model. The product of ten rows reads each weight once. How much
it brings changes with the state of the machine: compare several runs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bench.ceilings import Work
from bench.side_by_side import time_provider
from tq_fast.forest.huge_pages import gather_weights
from tq_fast.ops import few_rows_linear

_NUM_LAYERS, _ROWS, _IN, _OUT = 64, 10, 768, 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("provider", ["pages as given", "ours"])
def test_weights_in_huge_pages(benchmark, figure, provider, dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(_IN, _OUT, bias=False) for _ in range(_NUM_LAYERS)))
    layers = layers.to(dtype)
    x = torch.randn(_ROWS, _IN).to(dtype)
    with torch.inference_mode():
        expected = few_rows_linear(x, layers[0].weight)
        if provider == "ours":
            gather_weights(layers)
        assert few_rows_linear(x, layers[0].weight).equal(expected)
    time_provider(
        benchmark,
        figure,
        provider,
        f"few_rows_linear, {_ROWS} rows, {dtype}, of {_NUM_LAYERS} layers",
        few_rows_linear,
        itertools.cycle([(x, layer.weight) for layer in layers]),
        rounds=6 * _NUM_LAYERS,
        warmup_rounds=_NUM_LAYERS,
        work=Work(layers[0].weight.nbytes, 2 * _ROWS * _IN * _OUT),
        dtype=dtype,
    )
