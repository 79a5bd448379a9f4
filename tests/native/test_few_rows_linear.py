"""few_rows_linear in every vector variant; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.test_few_rows_linear import (
    DTYPES,
    assert_accurate,
    assert_near_dequantised,
    int8_problem,
    problem,
)
from tq_fast.ops._dispatch import unchecked_kernel

# Columns and outputs: of no multiple, of several blocks of columns, of several panels.
SIZES = [(1, 1), (16, 4), (31, 3), (33, 17), (64, 130), (768, 70), (770, 5), (2050, 21), (40, 600)]


def few_rows_linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    return unchecked_kernel("few_rows_linear")(x, weight, bias, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_kernel_is_accurate_and_a_row_does_not_depend_on_the_others(
    isa_or_amx, dtype, size_in, size_out
):
    x, weight, bias = problem(64, size_in, size_out, dtype)
    whole = few_rows_linear_cpu(x, weight, bias)
    assert_accurate(whole, x, weight, bias)
    for num_rows in (*range(1, 41), 63):
        part = few_rows_linear_cpu(x[:num_rows], weight, bias)
        assert torch.equal(part, whole[:num_rows])
    assert torch.equal(few_rows_linear_cpu(x[17:20], weight, bias), whole[17:20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_int8_weights_are_dequantised_and_a_row_does_not_depend_on_the_others(
    isa_or_amx, dtype, size_in, size_out
):
    x, *rest = int8_problem(64, size_in, size_out, dtype)
    whole = few_rows_linear_cpu(x, *rest)
    assert_near_dequantised(whole, x, *rest)
    for num_rows in (*range(1, 41), 63):
        part = few_rows_linear_cpu(x[:num_rows], *rest)
        assert torch.equal(part, whole[:num_rows])
    assert torch.equal(few_rows_linear_cpu(x[17:20], *rest), whole[17:20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 10, 16, 30])
def test_int8_weights_of_scale_one_give_the_bits_of_the_same_numbers_in_the_dtype_of_x(
    isa_or_amx, dtype, num_rows
):
    x, weight, bias, scale = int8_problem(num_rows, 770, 137, dtype)
    ones = torch.ones_like(scale)
    result = few_rows_linear_cpu(x, weight, bias, ones)
    if isa_or_amx == "amx" and dtype == torch.bfloat16:
        # Tiles multiply int8 weights as integers, which rounds otherwise.
        return assert_near_dequantised(result, x, weight, bias, ones)
    assert torch.equal(result, few_rows_linear_cpu(x, weight.to(dtype), bias))


@pytest.mark.parametrize("num_rows", [1, 5, 6, 10, 11, 256, 257])
def test_rows_of_any_magnitude_by_int8_weights(isa_or_amx, num_rows):
    # Tiles write a row as integers, whose unit its largest number sets.
    x, weight, _, scale = int8_problem(num_rows, 200, 37, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x *= 2.0 ** torch.randint(-90, 90, (num_rows, 1), generator=generator)
    x[:, 7] *= 1000.0
    x[:, 9] *= 1e-4
    result = few_rows_linear_cpu(x, weight, None, scale)
    exact = x.double() @ (scale.double()[:, None] * weight.double()).T
    weights = (scale.double()[:, None] * weight.double().abs()).T
    # The sums are fp32; an integer has an error of half its unit.
    terms = 2.0**-18 * (x.double().abs() @ weights)
    units = 2.0**-23 * x.double().abs().amax(1, keepdim=True) * weights.sum(0)
    assert ((result.double() - exact).abs() <= 2.0**-8 * exact.abs() + terms + units).all()


def test_rows_without_finite_or_large_numbers_by_int8_weights(isa_or_amx):
    x, weight, bias, scale = int8_problem(12, 130, 37, torch.bfloat16)
    expected = few_rows_linear_cpu(x, weight, bias, scale)
    x[3], x[4] = 0.0, 1e-39
    x[5, 128] = float("nan")
    x[11, 0] = float("inf")
    result = few_rows_linear_cpu(x, weight, bias, scale)
    assert result[5].isnan().all() and not result[11].isfinite().any()
    torch.testing.assert_close(result[3:5], bias.expand(2, -1))
    untouched = [0, 1, 2, 6, 7, 8, 9, 10]
    assert torch.equal(result[untouched], expected[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [10, 30])
def test_threads_change_no_bit_of_a_product_with_int8_weights(isa_or_amx, dtype, num_rows):
    inputs = int8_problem(num_rows, 900, 1003, dtype)
    results: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(few_rows_linear_cpu(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa_or_amx, dtype):
    x, weight, bias = problem(30, 900, 1003, dtype)
    results: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(few_rows_linear_cpu(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_go_where_they_belong_and_nowhere_else(isa_or_amx, dtype, special):
    x, weight, _ = problem(14, 50, 9, dtype)
    clean = few_rows_linear_cpu(x, weight, None)
    for row, column in ((3, 0), (13, 49)):
        spoiled = x.clone()
        spoiled[row, column] = special
        result = few_rows_linear_cpu(spoiled, weight, None)
        expected = spoiled[row].double() @ weight.double().T
        assert torch.equal(result[row].isnan(), expected.isnan())
        assert torch.equal(result[row].isposinf(), expected.isposinf())
        assert not result[row].isfinite().any()
        others = torch.arange(14) != row
        assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even_and_overflow_to_infinity(isa_or_amx, dtype):
    # Sixteen outputs and three: whole vectors and the rest are rounded by different code.
    values = torch.randn(4000).double() * 10.0 ** torch.randint(-6, 4, (4000,))
    weight = torch.cat([values.to(dtype), torch.tensor([torch.finfo(dtype).max] * 3, dtype=dtype)])
    x = torch.tensor([[1.0 + torch.finfo(dtype).eps]], dtype=dtype)
    result = few_rows_linear_cpu(x, weight[:, None], None)
    expected = (x.double() * weight.double()).float().to(dtype)
    smallest = torch.finfo(dtype).tiny
    normal = (expected.abs() >= smallest) | (dtype is torch.float16)
    assert torch.equal(result[0][normal[0]], expected[0][normal[0]])
    assert result[0, -3:].isinf().all()


def test_opcheck_passes():
    op = torch.ops.tq_fast.few_rows_linear.default
    x, weight, bias = problem(5, 20, 7, torch.float32)
    torch.library.opcheck(op, (x, weight, bias))
    torch.library.opcheck(op, (x[:, None], weight, None))
    torch.library.opcheck(op, int8_problem(5, 20, 7, torch.bfloat16))


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    op = torch.ops.tq_fast.few_rows_linear.default
    x, weight, bias = problem(5, 20, 7, torch.float32)
    _, numbers, _, scale = int8_problem(5, 20, 7, torch.float32)
    for arguments in (
        (x, numbers, bias),
        (x, weight, bias, scale),
        (x, numbers, bias, scale[1:]),
        (x, numbers, bias, scale[None]),
        (x[:, :19], numbers, bias, scale),
        (x[:, :19], weight, bias),
        (x, weight, bias[:6]),
        (x, weight.bfloat16(), None),
        (x[0], weight, None),
    ):
        with pytest.raises(RuntimeError, match="few_rows_linear"):
            op(*arguments)


def test_unknown_traits_of_processors_are_refused():
    with pytest.raises(RuntimeError, match="sse9"):
        torch.ops.tq_fast.cpu_has("sse9")
