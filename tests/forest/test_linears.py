"""Linear layers with int8 weights: recognised by trying, and multiplied where the numbers lie."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tests.forest.int8_weights import Int8Weight, WithInt8Rows, quantise
from tq_fast.forest import cpu_layers
from tq_fast.forest.cpu_layers import CpuLayers
from tq_fast.forest.linears import is_int8_linear, is_plain_linear, operands_of
from tq_fast.forest.view import view_of

# In 16 bits a quantiser's product is rounded four times, ours once: four halves of a spacing.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for few rows whatever instruction set it uses here."""
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 1000)


def layer_of(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_the_product_is_that_of_the_quantised_layer_which_is_not_called(
    dtype, bias, monkeypatch
) -> None:
    model = nn.Sequential(layer_of(dtype, bias))
    quantise(model[0])
    view = view_of(model)
    layers = CpuLayers(view, model)
    assert "1 of 1 linear layers with int8 weights run in the kernel" in str(layers)
    layers.install(10)
    # The sums of a quantiser's own product in fp16 end at 65504.
    for scale in (1.0, 8.0) if dtype is torch.float16 else (1.0, 100.0):
        x = (torch.randn(10, 1, 96) * scale).to(dtype)
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(Int8Weight, "multiply_rows", None)
            result = view(x)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale)


@torch.no_grad()
def test_the_numbers_are_not_copied() -> None:
    layer = layer_of()
    quantise(layer)
    numbers, _, scale = operands_of(layer)()
    assert numbers.data_ptr() == layer.weight.numbers.data_ptr()
    assert scale is not None and scale.shape == (40,)


@torch.no_grad()
def test_a_weight_that_was_replaced_is_the_one_that_multiplies() -> None:
    model = nn.Sequential(layer_of(bias=False))
    quantise(model[0])
    view = view_of(model)
    CpuLayers(view, model).install(2)
    before = view(torch.ones(2, 96))
    other = layer_of(bias=False)
    other.weight.mul_(-2)
    quantise(other)
    model[0].weight = other.weight
    torch.testing.assert_close(view(torch.ones(2, 96)), -2 * before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_quantised_rows_are_found_by_the_trial_and_told_of_once(dtype) -> None:
    model = nn.Sequential(layer_of(dtype), layer_of(dtype))
    quantise(model[0], WithInt8Rows)
    quantise(model[1])
    assert not is_int8_linear(model[0]) and is_int8_linear(model[1])
    view = view_of(model)
    with pytest.warns(UserWarning, match="1 of 2 linear layers with int8 weights run in the"):
        CpuLayers(view, model).install(2)
    assert "forward" not in view[0].__dict__ and "forward" in view[1].__dict__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CpuLayers(view_of(model), model)


@torch.no_grad()
def test_other_forms_of_int8_weights_are_left_alone() -> None:
    grouped, shifted, packed = layer_of(), layer_of(), layer_of()
    for layer in (grouped, shifted, packed):
        quantise(layer)
    # A scale for each group of columns; no symmetric range; two numbers a byte.
    grouped.weight.scales = torch.rand(40, 3)
    shifted.weight.multiply_rows = lambda x, *rest: (
        Int8Weight.multiply_rows(shifted.weight, x, *rest) + x.sum(-1, keepdim=True)
    )
    packed.weight.numbers = packed.weight.numbers[:, ::2]
    for layer in (grouped, shifted, packed):
        assert not is_int8_linear(layer) and not is_plain_linear(layer)


@torch.no_grad()
def test_one_scale_for_the_whole_weight_is_that_of_each_output() -> None:
    layer = layer_of()
    quantise(layer)
    layer.weight.scales = torch.tensor(0.01)
    assert is_int8_linear(layer)
    _, _, scale = operands_of(layer)()
    assert scale is not None and torch.equal(scale, torch.full((40,), 0.01))
