"""Marks tests that need a GPU, and deselects them where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
    if mine and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@contextlib.contextmanager
def refusing_to_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_sync() -> contextlib.AbstractContextManager[None]:
    """Return a context in which any operation that waits for the device raises."""
    return refusing_to_wait()
