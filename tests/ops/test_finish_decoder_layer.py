"""finish_decoder_layer: output projection, residuals, norm and gated MLP in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.test_project_qkv import DTYPES, assert_near, widened, with_int8_weights
from tq_fast.errors import InvalidArgument
from tq_fast.ops import finish_decoder_layer, finish_decoder_layer_ref

OP = "finish_decoder_layer"
# rows, tokens, attended columns, residual columns, inner columns
SHAPES = [(1, 1, 16, 16, 24), (10, 1, 72, 70, 131), (3, 5, 40, 33, 7), (2, 20, 96, 96, 64)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool = True) -> list[object]:
    rows, tokens, attended, size, inner = shape
    generator = torch.Generator().manual_seed(size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def linear(size_in: int, size_out: int) -> tuple[Tensor, Tensor | None]:
        return draw(size_out, size_in) / size_in**0.5, draw(size_out) if has_bias else None

    return [
        draw(rows, tokens, attended),
        draw(rows, tokens, size),
        linear(attended, size),
        draw(size),
        linear(size, inner),
        linear(size, inner),
        linear(inner, size),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_matches_the_formula_in_float64(op, dtype, shape, has_bias, is_int8):
    inputs = problem(shape, dtype, has_bias)
    if is_int8:
        inputs = [with_int8_weights(value) for value in inputs]
    expected = finish_decoder_layer_ref(*map(widened, inputs), eps=1e-5)
    result = op(*inputs, eps=1e-5)
    assert result.is_contiguous()
    assert_near(result, finish_decoder_layer_ref(*inputs, eps=1e-5), expected)


def test_inputs_are_not_written_to(op):
    inputs = problem((2, 3, 16, 24, 40), torch.bfloat16)
    before = [value.clone() for value in inputs[:2]]
    op(*inputs, eps=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(inputs[:2], before, strict=True))


def test_silu_of_huge_gates_is_their_own_size_or_zero(op):
    attended, residual, o, norm, gate, up, down = problem((1, 2, 8, 8, 8), torch.float32, False)
    gate = (gate[0] * 1e6, None)
    inputs = [attended, residual, o, norm, gate, up, down]
    exact = finish_decoder_layer_ref(*map(widened, inputs), eps=1e-5)
    torch.testing.assert_close(op(*inputs, eps=1e-5).double(), exact, rtol=1e-5, atol=10.0)


def test_a_nan_stays_in_its_row(op):
    inputs = problem((4, 1, 32, 24, 40), torch.float32)
    expected = op(*inputs, eps=1e-5)
    inputs[0][2, 0, 5] = torch.nan
    result = op(*inputs, eps=1e-5)
    assert result[2].isnan().all()
    torch.testing.assert_close(result[[0, 1, 3]], expected[[0, 1, 3]])


def test_nothing_in_nothing_out(op):
    attended, residual, *rest = problem((2, 3, 16, 24, 40), torch.float32)
    assert op(attended[:0], residual[:0], *rest, eps=1e-5).shape == (0, 3, 24)


def test_wrong_arguments_are_named():
    attended, residual, o, norm, gate, up, down = problem((2, 3, 16, 24, 40), torch.float32)
    good = {"o": o, "norm": norm, "gate": gate, "up": up, "down": down}
    for name, wrong, words in (
        ("o", (o[0][1:], None), "o_weight has shape"),
        ("norm", norm[1:], "norm_weight has shape"),
        ("gate", (gate[0][:, 1:], None), "gate_weight has shape"),
        ("up", (up[0][1:], None), "up_weight has shape"),
        ("down", (down[0], down[1][1:]), "down_bias has shape"),
        ("down", (down[0].half(), None), "down_weight is torch.float16"),
        ("up", with_int8_weights(up)[:2], "up_weight is torch.int8 and there is no up_scale"),
        ("gate", (*gate, gate[1]), "gate_weight is torch.float32 and has a gate_scale"),
    ):
        with pytest.raises(InvalidArgument, match=f"finish_decoder_layer: {words}"):
            finish_decoder_layer(attended, residual, *(good | {name: wrong}).values(), eps=1e-5)
    for pair, words in (
        ((attended[0], residual), "attended has shape"),
        ((attended[1:], residual), "residual has shape"),
    ):
        with pytest.raises(InvalidArgument, match=f"finish_decoder_layer: {words}"):
            finish_decoder_layer(*pair, *good.values(), eps=1e-5)
