"""The Triton kernels of value_sample_tokens: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests
from tq_fast.errors import BackendRefused
from tq_fast.ops import value_sample_tokens

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import value_sample_tokens as module

BF16, FP32 = torch.bfloat16, torch.float32


def launches(
    rows: int = 32,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (BF16, BF16, BF16),
    rank: int = 64,
    one_a_row: bool = False,
) -> list[compiling.Launch]:
    of_logits, of_directions, of_embeddings = dtypes
    heat = torch.empty(rows, device="meta") if one_a_row else 1.0
    count = torch.empty(1, dtype=torch.int64, device="meta") if one_a_row else 7
    return compiling.record(
        module,
        "value_sample_tokens_triton",
        torch.empty(rows, 128256, dtype=of_logits, device="meta"),
        torch.empty(rows, rank, dtype=of_directions, device="meta"),
        torch.empty(128256, rank, dtype=of_embeddings, device="meta"),
        torch.empty(rows, dtype=torch.int64, device="meta"),
        count,
        alpha=heat,
        temperature=heat,
        seed=count,
    )


def test_the_interpreter_passes_the_tests_of_the_op():
    # Splits and tiles are tried with 4097 tokens; the larger vocabularies are more of the same.
    # What is cut off goes to another backend.
    left_out = "32000 or 128256 or 1024 or top_k or top_p"
    assert run_op_tests("value_sample_tokens", left_out) > 40


def test_the_interpreter_draws_the_law():
    # Each row takes milliseconds here: the bulk of one law, and the far tails of two.
    left_out = "top_k or 0.7 or 0.6 or zipf or flat or head or relabelling or independent or 10-1"
    assert run_op_tests("value_sample_tokens_law", f"{left_out} or 14-63") >= 3


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize("one_a_row", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16), (FP32, FP32, FP32), (FP32, FP32, BF16)], ids=str
)
def test_compiles_without_spills(dtypes, one_a_row, architecture):
    recorded = launches(dtypes=dtypes, one_a_row=one_a_row)
    assert [launch.kernel.__name__ for launch in recorded] == [
        "_value_sample_tokens_kernel",
        "_value_sample_tokens_row_kernel",
    ]
    for launch in recorded:
        compiling.assert_fits(compiling.compile_launch(launch, architecture), architecture)


@pytest.mark.parametrize("rank", [0, 1, 17, 4096])
def test_any_rank_fits(rank):
    for launch in launches(rank=rank):
        compiling.assert_fits(compiling.compile_launch(launch, 90), 90)


@pytest.mark.parametrize("rows", [1, 2, 700])
def test_nothing_compiled_depends_on_the_batch(rows):
    def constants(rows: int) -> list[dict[str, object]]:
        return [launch.options for launch in launches(rows)]

    assert constants(rows) == constants(32)


def test_the_grid_is_one_split_of_one_tile_of_rows_a_program():
    first, last = launches(40)
    assert first.grid == (1002 * 3,)
    assert last.grid == (40,)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"top_k": 3}, "top_k or top_p is given; the kernel draws from the whole vocabulary"),
        ({"top_p": torch.full((2,), 0.5)}, "top_k or top_p is given"),
        ({"directions": torch.zeros(2, 4, dtype=torch.float64)}, "directions is float64"),
    ],
)
def test_refuses_what_it_does_not_take(monkeypatch, parameters, words):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = {
        "logits": torch.zeros(2, 5),
        "directions": torch.zeros(2, 4),
        "token_embeddings": torch.zeros(5, 4),
        "keys": torch.arange(2),
        "step": 0,
    }
    with pytest.raises(BackendRefused, match=words):
        value_sample_tokens(**arguments | parameters, backend="triton")
