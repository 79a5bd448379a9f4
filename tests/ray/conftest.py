"""Ray, started once for all tests that decode in workers, and what they compare with."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import job, trio

__all__ = ["job", "trio"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what needs Ray, where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        skip = pytest.mark.skip(reason="Ray is not installed (extra `ray`): make ray-test")
        for item in items:
            if item.get_closest_marker("ray") is not None:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Any]:
    """Ray on this machine, which jobs of this process use as it is."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file by index, without what settings say of models that lie elsewhere."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["index"] for record in records}) == len(records), "a prompt has two records"
    return sorted(records, key=lambda record: record["index"])


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal, numbers up to the rounding of fp32 in another batch."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and set(found) == set(wanted), where
        for name, value in wanted.items():
            assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for idx, value in enumerate(wanted):
            assert_same(found[idx], value, f"{where}[{idx}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4), where
    else:
        assert found == wanted, where
