"""What all tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tq_fast import env


def pytest_addoption(parser: pytest.Parser) -> None:
    """Without pytest-timeout the limit in pyproject.toml would be an unknown option, an error."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take; nobody looks at the clock here")


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of test inputs, new for each test."""
    return torch.Generator().manual_seed(20405495)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment variables that the package reads anew, within the test and after it."""
    env.reload()
    yield monkeypatch
    monkeypatch.undo()
    env.reload()
