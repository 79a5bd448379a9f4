"""The fixed job gives the stored records: no refactoring has changed a token or a value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.fixed_job.job import run_job

STORED = Path(__file__).with_name("records.jsonl")
# Sums of fp32 products are rounded in another order by another instruction set.
TOLERANCE = 2e-4


def differences(stored: Any, new: Any, place: str) -> list[str]:
    """Where two records differ: numbers by more than the tolerance, all else at all."""
    if isinstance(stored, dict) and isinstance(new, dict):
        keys = sorted({*stored, *new})
        parts = [(f"{place}.{key}", stored.get(key), new.get(key)) for key in keys]
    elif isinstance(stored, list) and isinstance(new, list) and len(stored) == len(new):
        parts = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(stored, new, strict=True))]
    elif isinstance(stored, float) and isinstance(new, float):
        both_nan = math.isnan(stored) and math.isnan(new)
        is_close = both_nan or math.isclose(stored, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return [] if is_close else [f"{place}: {stored} became {new}"]
    else:
        return [] if stored == new else [f"{place}: {stored} became {new}"]
    return [found for at, old, now in parts for found in differences(old, now, at)]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(json.dumps(record)) for record in run_job()]


def test_the_fixed_job_gives_the_stored_records(records: list[dict[str, Any]]) -> None:
    stored = [json.loads(line) for line in STORED.read_text().splitlines()]
    assert [record["job"] for record in records] == [record["job"] for record in stored]
    for old, new in zip(stored, records, strict=True):
        assert differences(old, new, old["job"]) == []


def test_the_comparison_sees_another_token_and_another_value() -> None:
    old = {"sequences": [[1, 2]], "q": [0.5, math.nan]}
    assert differences(old, {"sequences": [[1, 2]], "q": [0.5, math.nan]}, "") == []
    assert differences(old, {"sequences": [[1, 3]], "q": [0.5, math.nan]}, "")
    assert differences(old, {"sequences": [[1, 2]], "q": [0.6, math.nan]}, "")
    assert differences(old, {"sequences": [[1, 2]], "q": [0.5, 0.0]}, "")
