"""The Triton kernels of linear_trajectory_logprob: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import linear_trajectory_logprob as module

VOCAB_SIZE = 128256


def launches(
    dtype: torch.dtype, rows: int = 80, length: int = 20, softcap: float | None = None
) -> list[compiling.Launch]:
    def meta(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    return compiling.record(
        module,
        "linear_trajectory_logprob_triton",
        meta(rows, length, 4096),
        meta(VOCAB_SIZE, 4096),
        meta(rows, length, kind=torch.int64),
        meta(rows, kind=torch.int64),
        bias=None if softcap is None else meta(VOCAB_SIZE),
        softcap=softcap,
    )


def test_the_interpreter_passes_the_tests_of_the_op():
    left_out = "4097 or 8192 or 8193 or 32000 or 50257 or 128256 or 151936"
    left_out += " or (128 and tokens) or 1.0 or beside"
    assert run_op_tests("linear_trajectory_logprob", left_out) > 20


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "softcap"), [(torch.bfloat16, None), (torch.bfloat16, 30.0), (torch.float32, None)]
)
def test_compiles_without_spills(dtype, softcap, architecture):
    for launch in launches(dtype, softcap=softcap)[: 3 if dtype == torch.float32 else 1]:
        compiling.assert_fits(compiling.compile_launch(launch, architecture), architecture)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (80, 20), (4000, 128)])
def test_what_lies_between_the_kernels_stays_below_64_megabytes(rows, length):
    recorded = launches(torch.bfloat16, rows, length)
    product = recorded[0]
    peaks, sums, targets = product.arguments[5:8]
    terms = recorded[1].arguments[5]
    assert sum(tensor.nbytes for tensor in (peaks, sums, targets, terms)) < 64 * 2**20
    covered = [launch.arguments[19:21] for launch in recorded if launch.kernel is product.kernel]
    ends = [first + count for first, count in covered]
    assert [first for first, _ in covered] == [0, *ends[:-1]]
    assert ends[-1] == rows * length
