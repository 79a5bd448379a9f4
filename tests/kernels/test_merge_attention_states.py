"""The Triton kernel of merge_attention_states: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import merge_attention_states as module


def launches(dtype: torch.dtype, size: int, rows: int = 80) -> list[compiling.Launch]:
    out = torch.empty(rows, 16, size, dtype=dtype, device="meta")
    lse = torch.empty(rows, 16, device="meta")
    return compiling.record(module, "merge_attention_states_triton", out, lse, out, lse)


def test_the_interpreter_passes_the_tests_of_the_op():
    assert run_op_tests("merge_attention_states") > 20


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 64, 80, 128, 1000])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_compiles_without_spills(dtype, size, architecture):
    (launch,) = launches(dtype, size)
    compiling.assert_fits(compiling.compile_launch(launch, architecture), architecture)


@pytest.mark.parametrize("rows", [1, 2, 700])
def test_nothing_compiled_depends_on_the_batch(rows):
    assert launches(torch.bfloat16, 64, rows)[0].options == launches(torch.bfloat16, 64)[0].options
