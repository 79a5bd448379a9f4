"""The Triton kernels of trajectory_log_ratio: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import trajectory_log_ratio as module


def launches(rows: int, dtype: torch.dtype, size: int = 128256) -> list[compiling.Launch]:
    logits = torch.empty(rows, 20, size, dtype=dtype, device="meta")
    tokens = torch.empty(rows, 20, dtype=torch.int64, device="meta")
    lengths = torch.empty(rows, dtype=torch.int64, device="meta")
    return compiling.record(module, "trajectory_log_ratio_triton", logits, logits, tokens, lengths)


def test_the_interpreter_passes_the_tests_of_the_op():
    # One vocabulary of many splits is enough: 50257 takes 13 of them.
    assert run_op_tests("trajectory_log_ratio", "128256 or 50257-dtype0 or 50257-dtype2") > 20


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compiles_without_spills(dtype, architecture):
    recorded = launches(160, dtype)
    assert [launch.kernel.__name__ for launch in recorded] == [
        "_trajectory_log_ratio_kernel",
        "_trajectory_log_ratio_sum_kernel",
    ]
    for launch in recorded:
        compiling.assert_fits(compiling.compile_launch(launch, architecture), architecture)


def test_the_check_sees_spilled_registers():
    launch = launches(160, torch.float32)[0]
    starved = launch._replace(options=launch.options | {"maxnreg": 24})
    with pytest.raises(AssertionError, match="spills on sm_90"):
        compiling.assert_fits(compiling.compile_launch(starved, 90), 90)


def test_the_grid_is_one_split_of_one_token_a_program():
    first, last = launches(160, torch.bfloat16)
    assert first.grid == (160 * 20 * 32,)
    assert last.grid == (160,)
