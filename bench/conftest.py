"""What all benches share: figures that stand in the summary below pytest-benchmark's own table."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import pytest
import torch

_FIGURES = pytest.StashKey[list[str]]()
_LOAD = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []
    # Said beside the figures: what else runs on a machine changes them most.
    config.stash[_LOAD] = os.getloadavg()[0]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with one line of plain words and numbers, and the summary prints it."""
    return request.config.stash[_FIGURES].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash[_FIGURES]
    if not lines:
        return
    loads = terminalreporter.config.stash[_LOAD], os.getloadavg()[0]
    terminalreporter.section("figures")
    terminalreporter.write_line(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, load average {loads[0]:.1f} before and {loads[1]:.1f} after"
    )
    for line in lines:
        terminalreporter.write_line(line)
