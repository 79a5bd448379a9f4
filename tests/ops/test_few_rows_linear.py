"""few_rows_linear: a linear layer whose rows do not depend on one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.ops import tolerances
from tq_fast.errors import InvalidArgument
from tq_fast.ops import few_rows_linear

OP = "few_rows_linear"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size_in)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, size_in), (size_out, size_in), (size_out,))
    )
    return x, weight, bias


def assert_accurate(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`result` is no further from float64 than torch's own product, but for a small cap."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    worst = (linear(x, weight, bias).double() - exact).abs().max()
    assert result.dtype == x.dtype
    assert (result.double() - exact).abs().max() <= worst + tolerances.FEW_ROWS[x.dtype]


def int8_problem(
    rows: int, size_in: int, size_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, int8 weight of all 256 numbers, bias, and scales that bf16 does not hold."""
    x, _, bias = problem(rows, size_in, size_out, dtype)
    generator = torch.Generator().manual_seed(size_out)
    weight = torch.randint(-128, 128, (size_out, size_in), generator=generator).to(torch.int8)
    scale = torch.rand(size_out, generator=generator) / 100 + 1e-3
    return x, weight, bias, scale


def assert_near_dequantised(result: Tensor, x: Tensor, *rest: Tensor | None) -> None:
    """`result` is the product of the dequantised weights, summed in fp32 and rounded once."""
    weight, bias, scale = rest
    assert weight is not None and scale is not None
    exact = linear(x.double(), scale.double()[:, None] * weight.double())
    # What the terms could add up to bounds how far the order of a sum moves it.
    terms = linear(x.double().abs(), scale.double()[:, None] * weight.double().abs())
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = tolerances.INT8_TERMS * terms + tolerances.INT8_ROUNDED[x.dtype] * exact.abs()
    assert result.dtype == x.dtype
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 24), (7, 100), (10, 1, 128), (3, 5, 33), (64, 8)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_weights_give_the_product_of_the_dequantised_ones(op, dtype, shape, has_bias):
    rows = torch.Size(shape[:-1]).numel()
    x, weight, bias, scale = int8_problem(rows, shape[-1], 18, dtype)
    bias = bias if has_bias else None
    result = op(x.view(shape), weight, bias, scale)
    assert result.shape == (*shape[:-1], 18) and result.is_contiguous()
    assert_near_dequantised(result.view(rows, 18), x, weight, bias, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_int8_is_exact(op, dtype):
    numbers = torch.arange(-128, 128, dtype=torch.int8)
    # One number a row as the only column, and all of them as columns that ones pick.
    result = op(torch.ones(1, 1, dtype=dtype), numbers[:, None], None, torch.ones(256))
    assert result[0].tolist() == list(range(-128, 128))
    picked = op(torch.eye(256).to(dtype), numbers[None], None, torch.ones(1))
    assert picked[:, 0].tolist() == list(range(-128, 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_views_of_any_strides_give_the_same(op, dtype):
    x, weight, bias, scale = int8_problem(12, 70, 9, dtype)
    expected = op(x, weight, bias, scale)
    tall = torch.zeros(18, 71, dtype=torch.int8)
    tall[::2, 1:] = weight
    for view in (tall[::2, 1:], weight.t().contiguous().t()):
        result = op(x, view, bias, scale.repeat_interleave(2)[::2])
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 24), (7, 100), (10, 1, 24), (3, 5, 33), (64, 8)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_matches_the_linear_layer(op, dtype, shape, has_bias):
    rows = torch.Size(shape[:-1]).numel()
    x, weight, bias = problem(rows, shape[-1], 18, dtype)
    result = op(x.view(shape), weight, bias if has_bias else None)
    assert result.shape == (*shape[:-1], 18) and result.is_contiguous()
    assert_accurate(result.view(rows, 18), x, weight, bias if has_bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_strides_give_the_same(op, dtype):
    x, weight, bias = problem(12, 40, 9, dtype)
    expected = op(x, weight, bias)
    wide = torch.randn(12, 90).to(dtype)
    wide[:, 7:47] = x
    tall = torch.randn(18, 41).to(dtype)
    tall[::2, 1:] = weight
    spaced = torch.randn(3, 7, 40).to(dtype)
    spaced[:, 2:6] = x.view(3, 4, 40)
    for views in (
        (wide[:, 7:47], weight),
        (x, tall[::2, 1:]),
        (x.t().contiguous().t(), weight.t().contiguous().t()),
        (spaced[:, 2:6], weight),
        (x.view(3, 4, 40).transpose(0, 1).contiguous().transpose(0, 1), weight),
    ):
        result = op(*views, bias.repeat_interleave(2)[::2])
        torch.testing.assert_close(result.view(12, 9), expected)


def test_nothing_in_nothing_out(op):
    for rows, size_in, size_out in ((0, 8, 4), (3, 8, 0), (0, 0, 0)):
        x, weight, bias = problem(rows, size_in, size_out, torch.float32)
        assert op(x, weight, bias).shape == (rows, size_out)
    x, weight, bias = problem(3, 0, 5, torch.float32)
    assert torch.equal(op(x, weight, bias), bias.expand(3, 5))
    assert torch.equal(op(x, weight, None), torch.zeros(3, 5))


def test_int8_weights_without_numbers_leave_the_bias(op):
    x, weight, bias, scale = int8_problem(3, 0, 5, torch.float32)
    assert torch.equal(op(x, weight, bias, scale), bias.expand(3, 5))
    assert op(x[:0], weight, None, scale).shape == (0, 5)


def test_float64_is_summed_in_float64():
    x, weight, bias = (part.double() for part in problem(4, 30, 6, torch.float32))
    torch.testing.assert_close(few_rows_linear(x, weight, bias), linear(x, weight, bias))


def test_wrong_arguments_are_named():
    x, weight, bias = problem(4, 30, 6, torch.float32)
    _, numbers, _, scale = int8_problem(4, 30, 6, torch.float32)
    for arguments, words in (
        ((x[0], weight), "x has shape"),
        ((x, weight[:, 1:]), "weight has shape"),
        ((x, weight[0]), "weight has shape"),
        ((x, weight.half()), "weight is torch.float16"),
        ((x, weight, bias[1:]), "bias has shape"),
        ((x.long(), weight), "x is torch.int64"),
        ((x, numbers), "weight is torch.int8 and there is no scale"),
        ((x, numbers, None, scale[1:]), "scale has shape"),
        ((x, numbers, None, scale[:, None]), "scale has shape"),
        ((x, numbers, None, scale.bfloat16()), "scale is torch.bfloat16"),
        ((x, weight, None, scale), "weight is torch.float32 and has a scale"),
        ((x, numbers.short(), None, scale), "weight is torch.int16 and has a scale"),
        ((x, weight.requires_grad_()), "weight requires grad"),
    ):
        with pytest.raises(InvalidArgument, match=f"few_rows_linear: {words}"):
            few_rows_linear(*arguments)
