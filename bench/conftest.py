"""The table of figures that all benches share, below pytest-benchmark's own."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.ceilings import Work, measure_machine
from bench.runs import commit_id


class Ratios(NamedTuple):
    """One row of the table: the time of ours, and the times of the others as multiples of it.

    `work`, where given, is the least work of the shape; its products are of `dtype`.
    """

    group: str
    seconds: float
    others: dict[str, float]
    work: Work | None = None
    dtype: torch.dtype = torch.float32


_FIGURES = pytest.StashKey[list["str | Ratios"]]()
_LOAD = pytest.StashKey[float]()

# These libraries do the same on a GPU and have nothing that runs on a CPU.
_GPU_PEERS = {
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "flashinfer-python": "flashinfer",
    "flash-attn": "flash_attn",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the table of figures to this file, too")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []
    # The load is printed beside the figures, because other work on a machine changes them most.
    config.stash[_LOAD] = os.getloadavg()[0]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str | Ratios], None]:
    """Return a function that takes a row of ratios, or one line of plain words and numbers."""
    return request.config.stash[_FIGURES].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    figures = config.stash[_FIGURES]
    if not figures:
        return
    lines = [*_describe_run(config.stash[_LOAD]), "", *_table(figures)]
    lines += [line for line in figures if isinstance(line, str)]
    terminalreporter.section("figures")
    for line in lines:
        terminalreporter.write_line(line)
    if config.option.table is not None:
        config.option.table.parent.mkdir(parents=True, exist_ok=True)
        config.option.table.write_text("\n".join(lines) + "\n")


def _table(figures: list[str | Ratios]) -> list[str]:
    rows = [row for row in figures if isinstance(row, Ratios)]
    if not rows:
        return []
    lines = [
        *_describe_ceilings({row.dtype for row in rows if row.work is not None}),
        "| op and shape | ours, us | of the ceiling | times as long: |",
        "|---|---|---|---|",
    ]
    for row in rows:
        others = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row.others.items())
        lines.append(f"| {row.group} | {row.seconds * 1e6:.1f} | {_share(row)} | {others} |")
    return [*lines, ""]


def _describe_ceilings(dtypes: set[torch.dtype]) -> list[str]:
    if not dtypes:
        return []
    machines = {dtype: measure_machine(dtype) for dtype in sorted(dtypes, key=str)}
    read = max(machine.bytes_per_second for machine in machines.values())
    products = ", ".join(
        f"{dtype} products {machine.flops_per_second / 1e9:.0f} GFLOP/s"
        for dtype, machine in machines.items()
    )
    return [
        f"ceilings, measured in this run: memory {read / 1e9:.1f} GB/s, {products}; beside each op "
        "what it reaches of the one that binds it",
        "",
    ]


def _share(row: Ratios) -> str:
    """Return what ours reached of its ceiling; above 100 % where its input is cached."""
    if row.work is None:
        return ""
    machine = measure_machine(row.dtype)
    least = row.work.seconds(machine)
    if least == row.work.reading(machine):
        rate = f"{row.work.bytes_read / row.seconds / 1e9:.1f} GB/s"
    else:
        rate = f"{row.work.flops / row.seconds / 1e9:.0f} GFLOP/s"
    return f"{rate}, {100 * least / row.seconds:.0f} %"


def _describe_run(load: float) -> list[str]:
    commit = commit_id(short=True) or "of no commit"
    versions = [f"tq_fast {commit}", f"torch {torch.__version__}"]
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    peers = [name for name, module in _GPU_PEERS.items() if importlib.util.find_spec(module)]
    absent = "none of them installed" if not peers else f"installed: {', '.join(peers)}"
    return [
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}",
        ", ".join(versions),
        f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after, of these benches "
        f"{torch.get_num_threads()} at most: more than that disturbs the figures",
        f"not measured here, since they run on a GPU only: {', '.join(_GPU_PEERS)} ({absent})",
    ]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
