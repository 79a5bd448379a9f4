"""Options and fixtures that all tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tq_fast import env


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the time limit of pyproject.toml, an unknown option without pytest-timeout."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take; nobody looks at the clock here")


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded source of test inputs, new for each test."""
    return torch.Generator().manual_seed(20405495)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Yield a monkeypatch; the package reads its variables anew in the test and after it."""
    env.reload()
    yield monkeypatch
    monkeypatch.undo()
    env.reload()
