"""The Triton kernels of shared_prefix_attention: interpreted, and compiled for every target."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.interpreting import run_op_tests

pytest.importorskip("triton")

import triton

from tests.kernels import compiling
from tq_fast.kernels import shared_prefix_attention as module

DECODING = ["_shared_prefix_attention_prefix_kernel", "_shared_prefix_attention_kernel"]
WALKING = ["_shared_prefix_attention_walk_kernel"]


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
# 80 queries a row share tiles of 64 with those of other rows; 128 fill them by themselves.
MANY = {"new": 20}
FILLING = {"new": 32}
# A tree has 10 queries a key-value head, so that its tiles have 16 rows.
FEW = {"heads": (32, 32), "rows": 10, "trees": 1}

# Cases that Triton 3.6 spilled and 3.9 did not. With the package of another version, unpacked,
# ahead on PYTHONPATH they run with it:
#   pip download triton==3.6.0 --no-deps && unzip -d elsewhere triton-3.6.0-*.whl
#   PYTHONPATH=elsewhere pytest tests/kernels -k spills
SPILLED = [
    (torch.bfloat16, {"size": 16, "window": 100} | MANY, WALKING),
    (torch.bfloat16, {"size": 32, "has_tree": True}, DECODING[:1]),
    (torch.bfloat16, {"size": 64, "window": 100, "softcap": 30.0} | MANY, WALKING),
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
        (torch.bfloat16, {"size": 128} | FEATURES | FEW, DECODING),
        (torch.bfloat16, {"size": 128} | FEATURES | MANY, WALKING),
        (torch.bfloat16, {"size": 128} | FILLING, WALKING),
        (torch.bfloat16, {"size": 64} | MANY, WALKING),
        (torch.bfloat16, {"size": 256, "has_tree": True} | MANY, WALKING),
        (torch.float32, {"size": 128, "has_tree": True}, DECODING[:1]),
        (torch.float32, {"size": 128, "has_tree": True} | MANY | {"new": 17}, WALKING),
        *SPILLED,
    ],
    ids=str,
)
def test_compiles_without_spills(dtype, parameters, kernels, architecture):
    recorded = {launch.kernel.__name__: launch for launch in launches(dtype, **parameters)}
    assert list(recorded) == (DECODING if kernels[0] in DECODING else WALKING)
    for name in kernels:
        resources = compiling.compile_launch(recorded[name], architecture)
        compiling.assert_fits(resources, architecture)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_tiles_do_not_follow_from_how_rows_are_packed(size):
    def tiles(dtype: torch.dtype, **parameters: object) -> list[tuple[object, ...]]:
        recorded = launches(dtype, size=size, **parameters)
        names = ("QUERIES", "KEYS", "num_warps", "split_unit", "most_splits")
        return [tuple(launch.options[name] for name in names) for launch in recorded]

    for packed in ({"has_tree": True}, {"rows": 5, "trees": 1}, {"rows": 162, "trees": 3}):
        assert tiles(torch.bfloat16, **packed) == tiles(torch.bfloat16)
    # One tile serves every number of queries in fp32, where sums are the same to the last bit.
    assert tiles(torch.float32, rows=2, trees=1) == tiles(torch.float32)


def test_one_launch_serves_where_a_row_has_many_queries_or_no_prefix():
    def names(**parameters: int) -> list[str]:
        recorded = launches(torch.bfloat16, **parameters)
        return [launch.kernel.__name__ for launch in recorded]

    assert names() == DECODING
    assert names(new=16) == WALKING
    assert names(prefix=0) == DECODING[1:]


@pytest.mark.parametrize(("rows", "trees"), [(16, 2), (160, 2), (161, 7)])
@pytest.mark.parametrize("new", [1, 3, 20])
def test_nothing_compiled_depends_on_the_batch(rows, trees, new):
    def constants(**parameters: int) -> list[dict[str, object]]:
        recorded = launches(torch.bfloat16, has_tree=True, new=new, **parameters)
        return [
            {name: value for name, value in launch.options.items() if name.isupper()}
            | {name: launch.options[name] for name in ("num_warps", "num_stages")}
            for launch in recorded
        ]

    assert constants(rows=rows, trees=trees) == constants(rows=10, trees=1)


@pytest.mark.parametrize(
    ("heads", "prefix", "programs"),
    [
        ((32, 32), 512, 256),
        ((32, 32), 4096, 512),
        ((32, 8), 512, 64),
        ((32, 8), 4096, 256),
    ],
)
def test_one_tree_that_decodes_gives_so_many_programs(heads, prefix, programs):
    splits = launches(torch.bfloat16, heads=heads, rows=10, trees=1, prefix=prefix)[0]
    assert math.prod(splits.grid) == programs


def test_splits_follow_from_the_length_of_a_prefix_and_not_from_its_buffer():
    for new, heads in ((1, 8), (1, 32), (3, 8)):
        splits = module.choose_splits(new, heads)
        for length in (0, 1, 63, 64, 65, 1000, 1024, 1025, 4096, 100_000):
            keys = splits.unit * max(1, triton.cdiv(length, splits.unit * splits.most))
            needed = triton.cdiv(length, keys)
            assert needed <= splits.most
            # A launch over any larger buffer has a program for each of them.
            assert all(splits.bound(length + more, new, None) >= needed for more in (0, 1, 999))


def test_splits_begin_where_a_window_can_begin():
    def grid(**parameters: int) -> tuple[int, ...]:
        return launches(torch.bfloat16, prefix=32768, **parameters)[0].grid

    # A window of 256 keys meets five splits of 64 at most, wherever it lies.
    assert grid(window=256)[2] == 5
    assert grid()[2] == 32


@pytest.mark.parametrize(
    ("heads", "new", "tiles"),
    [
        # 10 rows of 80 queries fill 13 tiles of 64; two for each row would be 20.
        ((16, 4), 20, 13),
        # 21 tokens of 8 heads: 27 tiles instead of 30.
        ((32, 4), 21, 27),
        # Rows that fill their tiles keep them for themselves.
        ((16, 4), 32, 20),
        ((16, 4), 15 * 16, 150),
    ],
)
def test_rows_with_many_queries_share_tiles_where_theirs_would_be_idle(heads, new, tiles):
    (walk,) = launches(torch.bfloat16, heads=heads, new=new, rows=10, trees=2, has_tree=True)
    assert walk.grid == (tiles, 4)
