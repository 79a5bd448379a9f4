"""Both CPU ways of attention in every vector variant; tests/ops holds the contract itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast import _native
from tq_fast.ops import shared_prefix_attention, shared_prefix_attention_ref
from tq_fast.ops._attention_aten import shared_prefix_attention_aten

# The package's attribute of this name is the function.
module = sys.modules["tq_fast.ops.shared_prefix_attention"]

# trees, rows, query heads, key-value heads, head size, branch, prefix, queries
SHAPES = [
    (1, 1, 1, 1, 8, 1, 1, 1),
    (1, 5, 4, 4, 16, 5, 70, 1),
    (2, 6, 8, 2, 64, 33, 130, 3),
    (3, 3, 4, 1, 40, 70, 65, 9),
    (2, 4, 2, 2, 80, 6, 0, 2),
    (1, 30, 8, 2, 128, 20, 300, 1),
    (1, 2, 4, 2, 24, 200, 300, 64),
    (1, 3, 4, 2, 96, 40, 300, 17),
    (2, 2, 2, 1, 256, 150, 40, 140),
]


def shared_prefix_attention_cpu(*inputs: Tensor, **parameters: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.tq_fast.shared_prefix_attention.default(*inputs, **parameters)


def problem(shape: tuple[int, ...], dtype: torch.dtype, ragged: bool) -> list[Tensor]:
    trees, rows, heads, kv_heads, size, branch, prefix, queries = shape
    generator = torch.Generator().manual_seed(rows)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    prefix_len = torch.full((trees,), prefix)
    branch_len = torch.full((rows,), branch)
    if ragged:
        prefix_len = torch.randint(0, prefix + 1, (trees,), generator=generator)
        branch_len = torch.randint(queries, branch + 1, (rows,), generator=generator)
    return [
        draw(rows, heads, queries, size),
        draw(trees, kv_heads, prefix, size),
        draw(trees, kv_heads, prefix, size),
        prefix_len,
        draw(rows, kv_heads, branch, size),
        draw(rows, kv_heads, branch, size),
        branch_len,
    ]


def options(size: int, **given: Any) -> dict[str, Any]:
    return {"scale": size**-0.5, "softcap": None, "window": None, "tree": None, **given}


def check(function, inputs: list[Tensor], **given: Any) -> None:
    parameters = options(inputs[0].shape[-1], **given)
    out, lse = function(*inputs, **parameters)
    exact = [x.float() if x.is_floating_point() else x for x in inputs]
    expected_out, expected_lse = shared_prefix_attention_ref(*exact, **parameters)
    dtype = inputs[0].dtype
    assert out.dtype == dtype and lse.dtype == torch.float32
    atol = tolerances.ATTENTION_OUT[dtype]
    torch.testing.assert_close(out.float(), expected_out, rtol=0, atol=atol)
    atol = tolerances.ATTENTION_LSE[dtype]
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_reference(isa_or_amx, shape, ragged, dtype):
    inputs = problem(shape, dtype, ragged)
    for given in ({}, {"window": 7}, {"softcap": 3.0}, {"softcap": 20.0, "window": 90}):
        check(shared_prefix_attention_cpu, inputs, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_aten_calls_equal_the_reference(shape, ragged, dtype):
    inputs = problem(shape, dtype, ragged)
    for given in ({}, {"window": 7}, {"window": 90}):
        check(shared_prefix_attention_aten, inputs, **given)


@pytest.mark.parametrize("function", [shared_prefix_attention_cpu, shared_prefix_attention_aten])
def test_trees_of_unequal_numbers_of_rows(function, num_threads):
    inputs = problem((3, 7, 4, 2, 32, 9, 100, 2), torch.float32, True)
    check(function, inputs, tree=torch.tensor([0, 0, 0, 0, 2, 2, 2]))


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_written_on_any_number_of_threads(queries, dtype, num_threads):
    inputs = problem((4, 8, 4, 2, 32, 40, 300, queries), dtype, False)
    for lengths in ([300, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 300]):
        inputs[3] = torch.tensor(lengths)
        # Queries before their branch see no key of it; there is no work in their pieces.
        inputs[6] = torch.tensor([40 if length > 0 else 0 for length in lengths for _ in range(2)])
        check(shared_prefix_attention_cpu, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("prefix", [16, 131])
def test_memory_beyond_the_lengths_may_hold_nan(isa_or_amx, prefix, queries, dtype):
    inputs = problem((2, 6, 4, 2, 32, 70, prefix, queries), dtype, True)
    expected = shared_prefix_attention_cpu(*inputs, **options(32))
    for keys_or_values, lengths in ((1, 3), (2, 3), (4, 6), (5, 6)):
        for i, length in enumerate(inputs[lengths].tolist()):
            inputs[keys_or_values][i, :, length:] = torch.nan
    got = shared_prefix_attention_cpu(*inputs, **options(32))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_query_is_loud_and_leaves_the_others_alone(isa_or_amx, dtype):
    inputs = problem((1, 9, 4, 2, 32, 5, 70, 1), dtype, False)
    expected, _ = shared_prefix_attention_cpu(*inputs, **options(32))
    inputs[0][4, 1] = torch.nan
    out, _ = shared_prefix_attention_cpu(*inputs, **options(32))
    assert out[4, 1].isnan().all()
    expected[4, 1] = out[4, 1]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(isa_or_amx):
    # With several queries a row, one tile holds queries of neighbouring rows.
    inputs = problem((1, 5, 2, 1, 64, 30, 70, 10), torch.bfloat16, False)
    expected, _ = shared_prefix_attention_cpu(*inputs, **options(64))
    for x in (inputs[0], inputs[4], inputs[5]):
        x[2] = torch.nan
    out, _ = shared_prefix_attention_cpu(*inputs, **options(64))
    assert out[2].isnan().all()
    expected[2] = out[2]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("queries", [2, 20])
@pytest.mark.parametrize("given", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [16, 150])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(
    num_threads, prefix, given, queries, dtype
):
    inputs = problem((2, 60, 4, 2, 32, 40, prefix, queries), dtype, True)
    out, lse = shared_prefix_attention_cpu(*inputs, **options(32, **given))
    for row in (0, 29, 30, 59):
        tree = row // 30
        alone = [
            x[tree : tree + 1] if i in (1, 2, 3) else x[row : row + 1] for i, x in enumerate(inputs)
        ]
        out_alone, lse_alone = shared_prefix_attention_cpu(*alone, **options(32, **given))
        assert torch.equal(out_alone[0], out[row])
        assert torch.equal(lse_alone[0], lse[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views_are_read_where_they_lie(dtype):
    inputs = problem((2, 4, 4, 2, 32, 10, 50, 1), dtype, False)
    expected = shared_prefix_attention_cpu(*inputs, **options(32))
    q, prefix_k, prefix_v, prefix_len, branch_k, branch_v, branch_len = inputs
    # Rows of 33 numbers: a bf16 row then begins on any even address.
    buffer_k = torch.randn(2, 2, 90, 33, dtype=dtype)[..., 1:]
    buffer_v = torch.randn(2, 50, 2, 32, dtype=dtype)
    buffer_k[:, :, 20:70] = prefix_k
    buffer_v.copy_(prefix_v.transpose(1, 2))
    wide_q = torch.randn(4, 1, 4, 64, dtype=dtype)
    wide_q[..., :32] = q.transpose(1, 2)
    got = shared_prefix_attention_cpu(
        wide_q.transpose(1, 2)[..., :32],
        buffer_k[:, :, 20:70],
        buffer_v.transpose(1, 2),
        prefix_len,
        branch_k.transpose(2, 3).contiguous().transpose(2, 3),
        branch_v,
        branch_len,
        **options(32),
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("queries", [1, 3, 9])
def test_a_layer_reads_the_output_without_a_copy(queries):
    inputs = problem((2, 4, 4, 2, 32, 10, 50, queries), torch.float32, False)
    out, _ = shared_prefix_attention_cpu(*inputs, **options(32))
    assert out.transpose(1, 2).is_contiguous()


def test_opcheck_passes():
    op = torch.ops.tq_fast.shared_prefix_attention.default
    inputs = problem((2, 4, 4, 2, 16, 5, 10, 2), torch.float32, True)
    torch.library.opcheck(op, (*inputs, 0.25, None, None, None))
    tree = torch.tensor([0, 0, 0, 1])
    torch.library.opcheck(op, (*inputs, 0.25, 5.0, 6, tree))


def test_aten_serves_where_the_kernel_is_missing(monkeypatch):
    served: list[str] = []

    def aten(*inputs: Any, **parameters: Any) -> tuple[Tensor, Tensor]:
        served.append("aten")
        return shared_prefix_attention_aten(*inputs, **parameters)

    inputs = problem((1, 8, 4, 1, 32, 3, 2500, 1), torch.bfloat16, False)
    module._OP.forget()
    monkeypatch.setattr(module, "shared_prefix_attention_aten", aten)
    try:
        shared_prefix_attention(*inputs)
        assert not served
        monkeypatch.setattr(_native, "cpu_refusal", lambda: "the cpu library was not built")
        module._OP.forget()
        shared_prefix_attention(*inputs)
        assert served == ["aten"]
    finally:
        module._OP.forget()
