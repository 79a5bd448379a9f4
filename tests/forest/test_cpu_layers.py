"""The stand-ins for linear layers give the same numbers, and leave the user's model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tq_fast import _native
from tq_fast.forest import cpu_layers
from tq_fast.forest.cpu_layers import CpuLayers
from tq_fast.forest.view import view_of

# Both products round their fp32 sums in their own order; 16-bit results may round to a neighbour.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our product, whichever this processor would choose."""
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 1000)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (10, 1, 24), (2, 5, 24), (2, 3, 1, 24)])
def test_the_product_is_that_of_the_layer(any_processor, dtype, bias, shape) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 18, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        model = nn.Sequential(layer)
        view = view_of(model)
        CpuLayers(view, model).install(x.shape[:-1].numel())
        assert "forward" in view[0].__dict__ and "forward" not in layer.__dict__
        result = view[0](x)
    assert result.shape == expected.shape and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.inference_mode()
def test_a_weight_that_was_replaced_is_the_one_that_multiplies(any_processor) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    view = view_of(model)
    CpuLayers(view, model).install(2)
    view(torch.ones(2, 4))
    model[0].weight = nn.Parameter(torch.full((3, 4), 2.0), requires_grad=False)
    assert view(torch.ones(2, 4)).tolist() == [[8.0] * 3] * 2


def test_more_rows_than_it_was_measured_for_go_the_usual_way(monkeypatch) -> None:
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 12)
    model = nn.Sequential(nn.Linear(4, 4))
    view = view_of(model)
    layers = CpuLayers(view, model)
    for num_rows in (1, 12, 13, 12):
        layers.install(num_rows)
        assert ("forward" in view[0].__dict__) == (num_rows <= 12)


def test_another_backend_leaves_every_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    view = view_of(model)
    layers = CpuLayers(view, model, "ref")
    layers.install(10)
    assert "forward" not in view[0].__dict__
    assert str(layers).startswith("no decoder layer runs fused")


def test_a_subclass_of_linear_and_a_layer_patched_by_its_owner_are_left_alone(
    any_processor,
) -> None:
    class Owned(nn.Linear):
        pass

    model = nn.Sequential(Owned(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    view = view_of(model)
    CpuLayers(view, model).install(10)
    assert "forward" not in view[0].__dict__
    assert view[1](torch.ones(1)).item() == 1


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
def test_a_range_of_rows_for_every_instruction_set_but_the_oldest(isa) -> None:
    torch.ops.tq_fast.limit_cpu_isa(isa)
    try:
        is_base = _native.cpu_isa() == "base"
        for dtype in TOLERANCE:
            assert (cpu_layers.most_rows(dtype) == 0) == is_base
        assert cpu_layers.most_rows(torch.float64) == 0
    finally:
        torch.ops.tq_fast.limit_cpu_isa("amx")
