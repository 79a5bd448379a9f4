"""The Triton kernels of topk_logprobs: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests
from tq_fast.errors import BackendRefused
from tq_fast.ops import topk_logprobs

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import topk_logprobs as module

ONE_A_ROW = "one a row"


def launches(
    dtype: torch.dtype,
    k: int = 10,
    temperature: float | str = 1.0,
    size: int = 128256,
    rows: int = 80,
) -> list[compiling.Launch]:
    logits = torch.empty(rows, size, dtype=dtype, device="meta")
    heat = torch.empty(rows, device="meta") if temperature == ONE_A_ROW else temperature
    return compiling.record(module, "topk_logprobs_triton", logits, k, temperature=heat)


def test_the_interpreter_passes_the_tests_of_the_op():
    # Many splits and ties are tried with 128256 bf16 logits.
    left_out = "151936 or 50257 or 128256-dtype0 or 128256-dtype2"
    assert run_op_tests("topk_logprobs", left_out) > 40


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "k", "temperature"),
    [(torch.bfloat16, 10, 1.0), (torch.bfloat16, 128, ONE_A_ROW), (torch.float32, 20, 0.7)],
    ids=["bf16", "bf16-most", "fp32-warm"],
)
def test_compiles_without_spills(dtype, k, temperature, architecture):
    for launch in launches(dtype, k, temperature):
        compiling.assert_fits(compiling.compile_launch(launch, architecture), architecture)


def test_the_widest_vocabulary_and_the_largest_k_fit():
    row = launches(torch.bfloat16, 128, size=2**19)[-1]
    assert row.options["GROUPS"] * row.options["GROUP"] == 2**19
    compiling.assert_fits(compiling.compile_launch(row, 90), 90)


@pytest.mark.parametrize("rows", [1, 2, 700])
def test_nothing_compiled_depends_on_the_batch(rows):
    def constants(rows: int) -> list[dict[str, object]]:
        return [launch.options for launch in launches(torch.bfloat16, rows=rows)]

    assert constants(rows) == constants(80)


@pytest.mark.parametrize(
    ("size", "k", "dtype", "words"),
    [
        (300, 129, torch.float32, "k is 129; the kernel takes up to 128"),
        (2**19 + 1, 1, torch.float32, "vocab_size is 524289; the kernel takes up to 524288"),
        (300, 1, torch.float64, "logits is float64; the kernel takes float32"),
    ],
)
def test_refuses_what_one_program_cannot_hold(monkeypatch, size, k, dtype, words):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendRefused, match=words):
        topk_logprobs(torch.zeros(1, size, dtype=dtype), k, backend="triton")
