"""What all benches share: figures that stand in the summary below pytest-benchmark's own table."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

_FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with one line of plain words and numbers, and the summary prints it."""
    return request.config.stash[_FIGURES].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash[_FIGURES]
    if not lines:
        return
    terminalreporter.section("figures")
    terminalreporter.write_line(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    for line in lines:
        terminalreporter.write_line(line)
