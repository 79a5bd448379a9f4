"""The pages and pictures of a report, from summaries that were written by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tq_fast.evaluation.ceiling import summarise_ceiling
from tq_fast.evaluation.report import frontier, methods, page


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
        "ceiling": {},
        "is_to_beat": False,
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


def sweep(group: str, setting: str, kind: str, points: dict[float, tuple]) -> list[dict[str, Any]]:
    """Return the rows of a sweep; points are (KL, token-forwards, reward, gold) by value."""
    names = ("kl_to_sft", "token_forwards", "reward", "gold")
    rows = []
    for value, point in points.items():
        one = row(f"{group}, {setting} = {value:g}", kind, **dict(zip(names, point, strict=True)))
        rows.append({**one, "group": group, "swept": (setting, value)})
    return rows


def frontier_setup(**changes: Any) -> dict[str, Any]:
    best = sweep(
        "best of n", "n", "at most", {n: (n / 4, 90.0 * n, n / 4, n / 3) for n in (1, 4, 8)}
    )
    best = [{**one, "is_to_beat": True} for one in best]
    challenger = sweep(
        "TQ*", "alpha", "exact", {1.0: (1.0, 900.0, 0.5, 0.6), 0.5: (3.0, 950.0, 1.0, 1.1)}
    )
    single = row("SFT", "exact", kl_to_sft=0.0, token_forwards=45.0, reward=0.0, gold=0.0)
    records = [{"scores": {"reward": [i / 20 for i in range(64)]}}]
    kept = setup(*best, *challenger, {**single, "method": "sft"})
    return {**kept, "ceiling": summarise_ceiling(records), **changes}


def test_the_frontier_has_a_panel_for_divergence_and_for_cost_of_every_reward() -> None:
    assert frontier.has_frontier(frontier_setup())
    assert not frontier.has_frontier(setup(row("SFT", "exact", reward=0.0)))
    figure = frontier.frontier(frontier_setup())
    panels = figure.axes
    assert len(panels) == 4
    assert [axis.get_xscale() for axis in panels] == ["linear", "log"] * 2
    for axis in panels:
        texts = [text.get_text() for text in axis.texts]
        # What is to beat has its n beside its points, a sweep its values in its name.
        assert {"best of n", "4", "8"} <= set(texts)
        assert any(text in ("TQ*, alpha 1…0.5", "TQ*, alpha 0.5…1") for text in texts)
    # What is far below the others is not drawn, but named.
    for axis in panels[::2]:
        assert "below: SFT 0.00" in [text.get_text() for text in axis.texts]
        assert 0.25 < axis.get_ylim()[0] < 1.0
    # The gold reward was not scored in the pool: its panel has no ceiling.
    shaded = [any("out of reach" in text.get_text() for text in axis.texts) for axis in panels]
    assert shaded == [True, False, False, False]
    assert not any(
        "out of reach" in text.get_text()
        for axis in frontier.frontier(frontier_setup(ceiling=None)).axes
        for text in axis.texts
    )


def test_the_line_to_beat_is_thick_and_bounds_are_hollow() -> None:
    kl, cost = frontier.frontier(frontier_setup()).axes[:2]
    widths = {
        line.get_color(): line.get_linewidth() for line in kl.lines if len(line.get_xdata()) > 1
    }
    thick = max(widths, key=widths.get)
    assert thick == "#111111" and widths[thick] >= 3
    for axis, is_hollow in ((kl, True), (cost, False)):
        points = [line for line in axis.lines if line.get_marker() == "o"]
        assert len(points) == 3
        assert all((line.get_markerfacecolor() == "white") == is_hollow for line in points)
        exact = [
            line
            for line in axis.lines
            if line.get_color() == "#1f5fa8" and len(line.get_xdata()) == 1
        ]
        assert all(line.get_markerfacecolor() != "white" for line in exact)


def test_names_stand_inside_their_panel_and_not_on_each_other() -> None:
    figure = frontier.frontier(frontier_setup())
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axis in figure.axes:
        panel = axis.get_window_extent(renderer)
        boxes = [text.get_window_extent(renderer) for text in axis.texts if text.get_zorder() == 6]
        for i, box in enumerate(boxes):
            assert panel.x0 <= box.x0 and box.x1 <= panel.x1
            assert panel.y0 <= box.y0 and box.y1 <= panel.y1
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_is_not_measured_is_left_out_of_the_frontier() -> None:
    rows = frontier_setup()["methods"]
    for one in rows:
        del one["metrics"]["gold"]
    del rows[3]["metrics"]["kl_to_sft"], rows[4]["metrics"]["kl_to_sft"]
    kl, cost = frontier.frontier(frontier_setup(methods=rows)).axes
    assert not any("TQ*" in text.get_text() for text in kl.texts)
    assert any("TQ*" in text.get_text() for text in cost.texts)


def test_what_a_method_has_over_best_of_n_is_drawn_with_what_it_is() -> None:
    measures = {
        "reward": {
            "over": interval(0.5),
            "kind": "at least",
            "line": 1.25,
            "cost_ratio": {"value": 2.0, "low": 1.0, "high": 4.0, "beyond": (0, -1, 1)},
        }
    }
    methods_found = [{"name": "TQ*, alpha = 1", "cost": 900.0, "measures": measures}]
    comparison = {"line": "best of n", "methods": methods_found}
    drawn = frontier_setup(equal_cost=[comparison, {**comparison, "line": "best of n, SFT"}])
    (axis,) = frontier.over_best_of_n(drawn).axes
    markers = [line for line in axis.lines if line.get_marker() == ">" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in markers] == [0.5, 0.5]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["TQ*, alpha = 1"]
    labels = {one["name"]: one["label"] for one in drawn["methods"]}
    table = page.cost_table(comparison, labels)
    assert "<td>1.25</td><td>≥ +0.50 [+0.40, +0.60]</td><td>2x [≤ 1x, ≥ 4x]</td>" in table
