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


def test_float64_is_summed_in_float64():
    x, weight, bias = (part.double() for part in problem(4, 30, 6, torch.float32))
    torch.testing.assert_close(few_rows_linear(x, weight, bias), linear(x, weight, bias))


def test_wrong_arguments_are_named():
    x, weight, bias = problem(4, 30, 6, torch.float32)
    for arguments, words in (
        ((x[0], weight), "x has shape"),
        ((x, weight[:, 1:]), "weight has shape"),
        ((x, weight[0]), "weight has shape"),
        ((x, weight.half()), "weight is torch.float16"),
        ((x, weight, bias[1:]), "bias has shape"),
        ((x.long(), weight), "x is torch.int64"),
        ((x, weight.requires_grad_()), "weight requires grad"),
    ):
        with pytest.raises(InvalidArgument, match=f"few_rows_linear: {words}"):
            few_rows_linear(*arguments)
