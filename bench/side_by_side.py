"""Times the providers of one op on the same inputs, in one run, and reports ratios of medians."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.ceilings import Work
from bench.conftest import Ratios

PROVIDERS = ("eager", "compiled", "ours")

# Inputs take turns until they hold this much, so that no round finds its inputs in the cache.
_BYTES = 128 << 20

_medians: dict[tuple[str, str], float] = {}


def turns(make: Callable[[int], tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Return endless inputs `make(0)`, `make(1)`, ... and round again; `make` gets a seed."""
    first = make(0)
    nbytes = sum(x.nbytes for x in first if isinstance(x, torch.Tensor))
    rest = [make(seed) for seed in range(1, max(1, _BYTES // max(nbytes, 1 << 20)))]
    return itertools.cycle([first, *rest])


def time_provider(
    benchmark: BenchmarkFixture,
    figure: Callable[[Ratios], None],
    provider: str,
    group: str,
    function: Callable[..., Any],
    inputs: Iterator[tuple[Any, ...]],
    *,
    rounds: int = 30,
    warmup_rounds: int = 3,
    work: Work | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Time `function(*next(inputs))`; once "ours" is timed, report its ratio to the others.

    `work` is the least that the op must read and compute, in products of `dtype`.
    """
    benchmark.group = group
    if provider == "compiled":
        function = torch.compile(function)
    with torch.inference_mode():
        benchmark.pedantic(
            lambda: function(*next(inputs)), rounds=rounds, warmup_rounds=warmup_rounds
        )
    _medians[group, provider] = benchmark.stats.stats.median
    if provider != "ours":
        return
    ours = _medians[group, "ours"]
    others = {
        name: median for (of, name), median in _medians.items() if of == group and name != "ours"
    }
    ratios = {name: median / ours for name, median in others.items()}
    figure(Ratios(group, ours, ratios, work, dtype))
