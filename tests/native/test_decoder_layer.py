"""project_qkv and finish_decoder_layer in every vector variant; tests/ops holds the contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import test_finish_decoder_layer as finishing
from tests.ops import test_project_qkv as projecting
from tests.ops.test_project_qkv import DTYPES
from tq_fast.ops import finish_decoder_layer_ref, project_qkv_ref
from tq_fast.ops._dispatch import unchecked_kernel


def project_qkv_cpu(*inputs: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return unchecked_kernel("project_qkv")(*inputs, eps=eps)


def finish_decoder_layer_cpu(*inputs: Any, eps: float) -> Tensor:
    return unchecked_kernel("finish_decoder_layer")(*inputs, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", projecting.SHAPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_projections_equal_the_reference(isa_or_amx, shape, dtype, is_int8):
    inputs = projecting.problem(shape, dtype)
    if is_int8:
        inputs = [projecting.with_int8_weights(value) for value in inputs]
    exact = project_qkv_ref(*map(projecting.widened, inputs), eps=1e-5)
    plain = project_qkv_ref(*inputs, eps=1e-5)
    for parts in zip(project_qkv_cpu(*inputs, eps=1e-5), plain, exact, strict=True):
        projecting.assert_near(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", finishing.SHAPES)
@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8"])
def test_the_rest_of_the_layer_equals_the_reference(isa_or_amx, shape, dtype, is_int8):
    inputs = finishing.problem(shape, dtype)
    if is_int8:
        inputs = [projecting.with_int8_weights(value) for value in inputs]
    exact = finish_decoder_layer_ref(*map(projecting.widened, inputs), eps=1e-5)
    result = finish_decoder_layer_cpu(*inputs, eps=1e-5)
    projecting.assert_near(result, finish_decoder_layer_ref(*inputs, eps=1e-5), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_else_bit_for_bit(isa_or_amx, num_threads, dtype):
    # With more rows the product of the library serves, which promises nothing of the kind.
    rows = min(70, torch.ops.tq_fast.most_few_rows(torch.empty(0, dtype=dtype)))
    assert (rows >= 16) == (isa_or_amx != "base")
    some = slice(rows // 2, rows // 2 + 2)
    x, norm, q, k, v, cos, sin = projecting.problem((rows, 1, 96, 4, 2, 24), dtype)
    whole = project_qkv_cpu(x, norm, q, k, v, cos, sin, eps=1e-5)
    few = project_qkv_cpu(x[some], norm, q, k, v, cos[some], sin[some], eps=1e-5)
    assert all(torch.equal(a[some], b) for a, b in zip(whole, few, strict=True))
    attended, residual, *rest = finishing.problem((rows, 1, 64, 96, 130), dtype)
    whole = finish_decoder_layer_cpu(attended, residual, *rest, eps=1e-5)
    few = finish_decoder_layer_cpu(attended[some], residual[some], *rest, eps=1e-5)
    assert torch.equal(whole[some], few)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_go_through_the_product_of_the_library(isa_or_amx, dtype):
    rows = 1 + torch.ops.tq_fast.most_few_rows(torch.empty(0, dtype=dtype))
    inputs = projecting.problem((rows, 1, 40, 2, 1, 8), dtype)
    exact = project_qkv_ref(*map(projecting.widened, inputs), eps=1e-5)
    plain = project_qkv_ref(*inputs, eps=1e-5)
    with torch.profiler.profile() as profile:
        result = project_qkv_cpu(*inputs, eps=1e-5)
    assert any(event.key == "aten::linear" for event in profile.key_averages())
    for parts in zip(result, plain, exact, strict=True):
        projecting.assert_near(*parts)


def test_views_of_any_strides_give_the_same(isa_or_amx):
    inputs = projecting.problem((6, 2, 40, 2, 1, 8), torch.bfloat16)
    expected = project_qkv_cpu(*inputs, eps=1e-5)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    inputs[5], inputs[6] = (torch.stack([angle] * 2, -1)[..., 1] for angle in inputs[5:])
    got = project_qkv_cpu(*inputs, eps=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck_passes():
    x, norm, q, k, v, cos, sin = projecting.problem((2, 3, 16, 2, 1, 8), torch.float32)
    op = torch.ops.tq_fast.project_qkv.default
    torch.library.opcheck(op, (x, norm, 1e-5, *q, None, *k, None, v[0], None, None, cos, sin))
    int8 = projecting.with_int8_weights
    torch.library.opcheck(op, (x, norm, 1e-5, *int8(q), *int8(k), *int8(v), cos, sin))
    attended, residual, o, norm, gate, up, down = finishing.problem(
        (2, 3, 16, 24, 40), torch.float32
    )
    op = torch.ops.tq_fast.finish_decoder_layer.default
    rest = (part for linear in (gate, up, down) for part in int8(linear))
    torch.library.opcheck(op, (attended, residual, *int8(o), norm, 1e-5, *rest))
    torch.library.opcheck(
        op, (attended, residual, *o, None, norm, 1e-5, *gate, None, *up, None, down[0], None, None)
    )


def test_the_operators_refuse_what_would_read_out_of_bounds():
    x, norm, q, k, v, cos, sin = projecting.problem((2, 3, 16, 2, 1, 8), torch.float32)
    op = torch.ops.tq_fast.project_qkv.default
    for arguments in (
        (x, norm[1:], 1e-5, *q, None, *k, None, *v, None, cos, sin),
        (x, norm, 1e-5, q[0][1:], None, None, *k, None, *v, None, cos, sin),
        (x, norm, 1e-5, *q, None, *k, None, *v, None, cos, sin[:1]),
        (x, norm, 1e-5, *q, None, *k, None, *v, None, cos[:, :2], sin[:, :2]),
    ):
        with pytest.raises(RuntimeError, match="project_qkv"):
            op(*arguments)
    attended, residual, o, norm, gate, up, down = finishing.problem(
        (2, 3, 16, 24, 40), torch.float32
    )
    op = torch.ops.tq_fast.finish_decoder_layer.default
    for arguments in (
        (attended[:1], residual, *o, None, norm, 1e-5, *gate, None, *up, None, *down, None),
        (attended, residual, *o, None, norm, 1e-5, *gate, None, up[0][1:], None, None, *down, None),
        (attended, residual, *o, None, norm[1:], 1e-5, *gate, None, *up, None, *down, None),
    ):
        with pytest.raises(RuntimeError, match="finish_decoder_layer"):
            op(*arguments)
