"""What stands in for linear layers: the same numbers, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tq_fast import _native
from tq_fast.forest import cpu_layers
from tq_fast.forest.cpu_layers import CpuLayers

# Both products round their fp32 sums in their own order; 16-bit results may round to a neighbour.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["ours", "transposed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both stand-ins, whichever this processor would choose."""
    ours, transposed = (1000, 0) if request.param == "ours" else (0, 1000)
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: ours)
    monkeypatch.setattr(cpu_layers, "most_rows_transposed", lambda dtype: transposed)
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (10, 1, 24), (2, 5, 24), (2, 3, 1, 24)])
def test_the_product_is_that_of_the_layer(way, dtype, bias, shape) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 18, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        with CpuLayers(nn.Sequential(layer)).during(x.shape[:-1].numel()):
            assert "forward" in layer.__dict__
            result = layer(x)
    assert result.shape == expected.shape and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_layers_are_as_they_were_afterwards_even_after_an_error(way) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ZeroDivisionError), CpuLayers(model).during(10):
        assert "forward" in model[0].__dict__
        raise ZeroDivisionError
    assert all("forward" not in layer.__dict__ for layer in model)


@torch.inference_mode()
def test_a_weight_that_was_replaced_is_the_one_that_multiplies(way) -> None:
    layer = nn.Linear(4, 3, bias=False)
    product = CpuLayers(nn.Sequential(layer))
    with product.during(2):
        layer(torch.ones(2, 4))
    layer.weight = nn.Parameter(torch.full((3, 4), 2.0), requires_grad=False)
    with product.during(2):
        assert layer(torch.ones(2, 4)).tolist() == [[8.0] * 3] * 2


def test_more_rows_than_it_was_measured_for_go_the_usual_way(monkeypatch) -> None:
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 12)
    monkeypatch.setattr(cpu_layers, "most_rows_transposed", lambda dtype: 0)
    layer = nn.Linear(4, 4)
    product = CpuLayers(nn.Sequential(layer))
    for num_rows in (1, 12, 13):
        with product.during(num_rows):
            assert ("forward" in layer.__dict__) == (num_rows <= 12)


def test_another_backend_leaves_every_layer_alone() -> None:
    layer = nn.Linear(4, 4)
    with CpuLayers(nn.Sequential(layer), "ref").during(10):
        assert "forward" not in layer.__dict__


def test_a_subclass_of_linear_and_a_layer_patched_by_its_owner_are_left_alone(way) -> None:
    class Owned(nn.Linear):
        pass

    owned, patched = Owned(4, 4), nn.Linear(4, 4)
    patched.forward = lambda x: x
    with CpuLayers(nn.Sequential(owned, patched)).during(10):
        assert "forward" not in owned.__dict__
        assert patched(torch.ones(1)).item() == 1
    assert "forward" in patched.__dict__


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
@pytest.mark.parametrize("traits", [set(), {"amd"}, {"avx512_bf16", "amx"}, {"amd", "avx512_bf16"}])
def test_a_range_of_rows_for_every_processor(monkeypatch, isa, traits) -> None:
    monkeypatch.setattr(_native, "cpu_isa", lambda: isa)
    monkeypatch.setattr(_native, "cpu_has", traits.__contains__)
    for dtype in TOLERANCE:
        most = cpu_layers.most_rows(dtype)
        assert (most == 0) == (isa == "base")
        assert cpu_layers.most_rows_of_a_layer(dtype) >= most
    assert (
        cpu_layers.most_rows(torch.float64) == cpu_layers.most_rows_of_a_layer(torch.float64) == 0
    )
    assert cpu_layers.most_rows_transposed(torch.bfloat16) == (80 if "amx" in traits else 0)
