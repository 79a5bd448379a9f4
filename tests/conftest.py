"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tq_fast import env


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
