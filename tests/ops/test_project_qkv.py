"""project_qkv: norm, three linear layers and rotary positions in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.errors import InvalidArgument
from tq_fast.ops import project_qkv, project_qkv_ref

OP = "project_qkv"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, tokens, columns, query heads, key-value heads, head size
SHAPES = [(1, 1, 16, 2, 2, 8), (10, 1, 70, 6, 2, 12), (3, 5, 33, 4, 1, 40), (2, 20, 96, 3, 3, 64)]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool = True, shared_angles: bool = False
) -> list[object]:
    rows, tokens, size, heads, kv_heads, head_size = shape
    generator = torch.Generator().manual_seed(size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def linear(count: int) -> tuple[Tensor, Tensor | None]:
        weight = draw(count * head_size, size) / size**0.5
        return weight, draw(count * head_size) if has_bias else None

    angles = torch.randn(1 if shared_angles else rows, tokens, head_size, generator=generator)
    linears = linear(heads), linear(kv_heads), linear(kv_heads)
    x, norm_weight = draw(rows, tokens, size) * 5, draw(size)
    return [x, norm_weight, *linears, angles.cos().to(dtype), angles.sin().to(dtype)]


def with_int8_weights(value: object) -> object:
    """Quantise the linear layers among the inputs of an op for decoder layers."""
    if not isinstance(value, tuple):
        return value
    scale = value[0].float().abs().amax(1) / 127
    numbers = (value[0].float() / scale[:, None]).round().to(torch.int8)
    return numbers, value[1], scale


def widened(value: object) -> object:
    """The inputs in float64, int8 weights dequantised there."""
    if isinstance(value, tuple) and len(value) == 3:
        weight, bias, scale = value
        return weight.double() * scale.double()[:, None], widened(bias)
    if isinstance(value, tuple):
        return tuple(widened(part) for part in value)
    return value.double() if isinstance(value, Tensor) else value


def assert_near(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """A result is not much further from float64 than the same steps in PyTorch."""
    assert got.dtype == plain.dtype and got.shape == exact.shape
    worst = (plain.double() - exact).abs().max()
    bound = tolerances.LAYER_FACTOR * worst + tolerances.LAYER[got.dtype]
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias, shared_angles", [(True, False), (False, True)])
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_matches_the_formula_in_float64(op, dtype, shape, has_bias, shared_angles, is_int8):
    inputs = problem(shape, dtype, has_bias, shared_angles)
    if is_int8:
        inputs = [with_int8_weights(value) for value in inputs]
    exact = project_qkv_ref(*map(widened, inputs), eps=1e-5)
    plain = project_qkv_ref(*inputs, eps=1e-5)
    for parts in zip(op(*inputs, eps=1e-5), plain, exact, strict=True):
        assert_near(*parts)


def test_nothing_in_nothing_out(op):
    inputs = problem((2, 3, 16, 2, 1, 8), torch.float32)
    empty = [inputs[0][:0], *inputs[1:5], inputs[5][:1, :], inputs[6][:1]]
    q, k, v = op(*empty, eps=1e-5)
    assert q.shape == (0, 3, 2, 8) and k.shape == v.shape == (0, 3, 1, 8)


def test_a_nan_stays_in_its_row(op):
    inputs = problem((4, 1, 32, 2, 1, 16), torch.float32)
    expected = op(*inputs, eps=1e-5)
    inputs[0][2, 0, 5] = torch.nan
    for got, want in zip(op(*inputs, eps=1e-5), expected, strict=True):
        assert got[2].isnan().all()
        torch.testing.assert_close(got[[0, 1, 3]], want[[0, 1, 3]])


def test_wrong_arguments_are_named():
    x, norm, q, k, v, cos, sin = problem((2, 3, 16, 2, 1, 8), torch.float32)
    numbers, bias, scale = with_int8_weights(q)
    for arguments, words in (
        ((x, norm, (numbers, bias), k, v, cos, sin), "q_weight is torch.int8 and there is no"),
        ((x, norm, (numbers, bias, scale[1:]), k, v, cos, sin), "q_scale has shape"),
        ((x, norm, (numbers, bias, scale.half()), k, v, cos, sin), "q_scale is torch.float16"),
        ((x, norm, (*q, scale), k, v, cos, sin), "q_weight is torch.float32 and has a q_scale"),
        ((x, norm, (*q, scale, scale), k, v, cos, sin), "q_linear is"),
        ((x[0], norm, q, k, v, cos, sin), "x has shape"),
        ((x, norm[1:], q, k, v, cos, sin), "norm_weight has shape"),
        ((x, norm, (q[0][:15], None), k, v, cos, sin), "q_weight has shape"),
        ((x, norm, (q[0], q[1][1:]), k, v, cos, sin), "q_bias has shape"),
        ((x, norm, q, (k[0][:, 1:], None), v, cos, sin), "k_weight has shape"),
        ((x, norm, q, k, q, cos, sin), "v_weight has shape"),
        ((x, norm, q, k, v, cos[:, 1:], sin), "cos has shape"),
        ((x, norm, q, k, v, cos, sin[..., 1:]), "sin has shape"),
        ((x, norm, q, k, v, cos.half(), sin), "cos is torch.float16"),
        ((x, norm, q, k, (v[0].half(), None), cos, sin), "v_weight is torch.float16"),
    ):
        with pytest.raises(InvalidArgument, match=f"project_qkv: {words}"):
            project_qkv(*arguments, eps=1e-5)
