"""The pages and pictures of a report, from summaries that were written by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from tq_fast.evaluation.report import methods, page


def interval(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def row(name: str, kind: str, **metrics: float) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "method": "transfer_q",
        "group": name,
        "swept": None,
        "responses": 2,
        "failed": 0,
        "kl_kind": kind,
        "metrics": {measure: interval(value) for measure, value in metrics.items()},
    }


def setup(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "s",
        "title": "By hand",
        "target": "r",
        "baseline_reward": None,
        "judge": "reward",
        "compare_with": [],
        "ceiling": None,
        "equal_cost": [],
        "methods": list(rows),
    }


MARKS = {"exact": "", "at most": "≤ ", "approximate": "≲ "}


def test_a_divergence_that_is_a_bound_is_marked_in_table_and_picture() -> None:
    kinds = list(MARKS)
    rows = [row(kind, kind, reward=1.0, kl_to_sft=2.5 + i) for i, kind in enumerate(kinds)]
    table = page.results_table(setup(*rows))
    (axis,) = methods.quality_by_method(setup(*rows)).axes
    faces = [line.get_markerfacecolor() for line in axis.lines if line.get_marker() == "o"]
    for i, kind in enumerate(kinds):
        number = f"{MARKS[kind]}{2.5 + i:.2f}"
        assert f"<td>{number}<small>" in table
        assert axis.texts[i].get_text() == number
        # A hollow point is a bound.
        assert (faces[i] == "white") == (kind != "exact")


@pytest.mark.parametrize(
    ("kind", "kl", "said"),
    [
        ("exact", 2.0, "KL to SFT 2.0 nats"),
        ("at most", 2.0, "KL to SFT at most 2.0 nats"),
        ("at most", None, "KL to SFT not known"),
    ],
)
def test_a_response_says_what_its_divergence_is(kind: str, kl: float | None, said: str) -> None:
    record = {
        "prompt": "p",
        "response": "r",
        "certificate": {"kl_kind": kind},
        "measures": {"reward": 1.0, "kl_to_sft": kl},
        "trace": [],
    }
    assert f"reward 1.00, {said}</summary>" in page.trace_view(record, "TQ", is_open=True)
