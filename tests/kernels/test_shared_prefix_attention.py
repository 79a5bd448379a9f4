"""The Triton kernels of shared_prefix_attention: interpreted, and compiled for every target."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreting import run_op_tests

pytest.importorskip("triton")

from tests.kernels import compiling
from tq_fast.kernels import shared_prefix_attention as module

DECODING = ["_shared_prefix_attention_prefix_kernel", "_shared_prefix_attention_kernel"]


def launches(
    dtype: torch.dtype,
    *,
    size: int = 128,
    new: int = 1,
    heads: tuple[int, int] = (16, 4),
    rows: int = 160,
    trees: int = 2,
    prefix: int = 1024,
    window: int | None = None,
    softcap: float | None = None,
    has_tree: bool = False,
) -> list[compiling.Launch]:
    def meta(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    return compiling.record(
        module,
        "shared_prefix_attention_triton",
        meta(rows, new, heads[0], size).transpose(1, 2),
        *(meta(trees, heads[1], prefix, size) for _ in "kv"),
        meta(trees, kind=torch.int64),
        *(meta(rows, heads[1], 32, size) for _ in "kv"),
        meta(rows, kind=torch.int64),
        scale=size**-0.5,
        softcap=softcap,
        window=window,
        tree=meta(rows, kind=torch.int64) if has_tree else None,
    )


# pytest's -k: one head layout of three, a few windows, the head sizes at which tiles change.
OTHER_HEADS = "own or for or (one and head)"
OTHER_WINDOWS = "1000 or windows and (even or new or prompt or tree or uneven)"


def test_the_interpreter_passes_the_tests_of_the_op():
    left_out = f"{OTHER_HEADS} or {OTHER_WINDOWS} or 128 or 80 or more or scales or nothing"
    left_out += " or dtype2 or (1- and dtype0)"
    assert run_op_tests("shared_prefix_attention", left_out) > 40


FEATURES = {"window": 100, "softcap": 30.0, "has_tree": True}
MANY = {"new": 20}

# Cases that Triton 3.6 spilled and 3.9 did not. With the package of another version, unpacked,
# ahead on PYTHONPATH they run with it:
#   pip download triton==3.6.0 --no-deps && unzip -d elsewhere triton-3.6.0-*.whl
#   PYTHONPATH=elsewhere pytest tests/kernels -k spills
SPILLED = [
    (torch.bfloat16, {"size": 16, "window": 100} | MANY, DECODING[1:]),
    (torch.bfloat16, {"size": 32, "has_tree": True}, DECODING[:1]),
    (torch.bfloat16, {"size": 64, "window": 100, "softcap": 30.0} | MANY, DECODING[1:]),
    (torch.bfloat16, {"size": 64} | FEATURES, DECODING[:1]),
    (torch.bfloat16, {"size": 256, "has_tree": True}, DECODING[:1]),
    (torch.float32, {"size": 64, "softcap": 30.0}, DECODING[:1]),
    (torch.float32, {"size": 32, "window": 100, "has_tree": True}, DECODING[:1]),
]


@pytest.mark.parametrize("architecture", compiling.ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "parameters", "kernels"),
    [
        (torch.bfloat16, {"size": 128} | FEATURES, DECODING),
        (torch.bfloat16, {"size": 128} | MANY, DECODING[1:]),
        (torch.bfloat16, {"size": 64} | MANY, DECODING[1:]),
        (torch.float32, {"size": 128, "has_tree": True}, DECODING[:1]),
        *SPILLED,
    ],
    ids=str,
)
def test_compiles_without_spills(dtype, parameters, kernels, architecture):
    recorded = {launch.kernel.__name__: launch for launch in launches(dtype, **parameters)}
    for name in kernels:
        resources = compiling.compile_launch(recorded[name], architecture)
        compiling.assert_fits(resources, architecture)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_tiles_do_not_follow_from_how_rows_are_packed(size):
    def tiles(**parameters: object) -> list[tuple[object, ...]]:
        recorded = launches(torch.bfloat16, size=size, **parameters)
        names = ("QUERIES", "KEYS", "num_warps", "split_len")
        return [tuple(launch.options[name] for name in names) for launch in recorded]

    assert tiles(has_tree=True) == tiles() == tiles(rows=2, trees=1)


def test_one_launch_serves_where_a_row_fills_tiles_or_has_no_prefix():
    def names(**parameters: int) -> list[str]:
        recorded = launches(torch.bfloat16, **parameters)
        return [launch.kernel.__name__ for launch in recorded]

    assert names() == DECODING
    assert names(new=16) == DECODING[1:]
    assert names(prefix=0) == DECODING[1:]


@pytest.mark.parametrize(("rows", "trees"), [(8, 2), (160, 2), (161, 7)])
def test_nothing_compiled_depends_on_the_batch(rows, trees):
    def constants(**parameters: int) -> list[dict[str, object]]:
        recorded = launches(torch.bfloat16, has_tree=True, **parameters)
        return [
            {name: value for name, value in launch.options.items() if name.isupper()}
            | {name: launch.options[name] for name in ("split_len", "num_warps", "num_stages")}
            for launch in recorded
        ]

    assert constants(rows=rows, trees=trees) == constants(rows=10, trees=1)
