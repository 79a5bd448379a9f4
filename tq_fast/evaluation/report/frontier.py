"""The pictures that say what pays: reward against divergence and cost, and against best of n."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ...results.trace_figure import DPI
from ..ceiling import CeilingPoint, read_curve
from .labels import Label, Panel, place_labels
from .methods import GRID, Row, Setup
from .sweeps import lines_of, swept_settings

# Settings that trade reward for divergence or cost; the others are ablations.
_TRADES = ("alpha", "n", "mix", "stages", "branches")
# The line to beat is black and thick; what challenges it has a colour.
_TO_BEAT = ("#111111", "#7d7d7d")
_PALETTE = (
    *("#1f5fa8", "#d9822b", "#0f8b8d", "#c0392b"),
    *("#7a5195", "#6a9a3b", "#8c6d46", "#d1518f"),
)
_PLAIN = {"sft": "#7d7d7d", "baseline": "#111111"}
_MARKERS = "osD^vP"
_BEYOND = "#e9e9e9"
# What a difference at equal cost is, and its marker.
_KIND_MARKERS = {"equal": "o", "at least": ">", "at most": "<"}
_KIND_NAMES = {
    "at least": "at least (cheaper than the smallest n)",
    "at most": "at most (dearer than the largest n)",
}
_TITLES = {"reward": "average target reward", "gold": "average gold reward"}
_AXES = {
    "kl_to_sft": "KL to SFT (nats a response; hollow: at most)",
    "token_forwards": "token-forwards a response (all models, log scale)",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """One method, or one with a setting changed, as a line of points.

    Attributes:
        label: its name in the picture.
        setting: what is changed along the line; None for a single method.
        rows: of the summary, by the value of the setting.
        values: of the setting, one a row.
        colour, marker: how it looks.
        is_to_beat: whether it is best of n from one model.
    """

    label: str
    setting: str | None
    rows: Sequence[Row]
    values: Sequence[float]
    colour: str
    marker: str
    is_to_beat: bool

    def points(self, x: str, y: str) -> list[tuple[float, float, Row, float]]:
        """Return (x, y, row, value) of the rows that have both measures, by x."""
        values = self.values or [0.0]
        found = [
            (row["metrics"][x]["value"], row["metrics"][y]["value"], row, value)
            for row, value in zip(self.rows, values, strict=True)
            if {x, y} <= row["metrics"].keys()
        ]
        return sorted(found, key=lambda point: point[3])


def has_frontier(setup: Setup) -> bool:
    """Return whether a set-up sweeps a setting that trades reward for divergence or cost."""
    return any(setting in _TRADES for setting in swept_settings(setup))


def frontier(setup: Setup) -> Figure:
    """Draw reward, and gold reward if known, against divergence and against cost."""
    paths = _paths(setup)
    measures = [name for name in _TITLES if any(name in r["metrics"] for r in setup["methods"])]
    figure = Figure(figsize=(11.2, 5.6 * len(measures)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(measures), 2, squeeze=False, sharex="col", sharey="row")
    _fit_across(panels[0], paths, measures)
    named = []
    for row, measure in zip(panels, measures, strict=True):
        for axis, x in zip(row, _AXES, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(True, **GRID)
            axis.set_axisbelow(True)
            _draw_paths(axis, paths, x, measure)
            axis.set_xlabel(_AXES[x])
            axis.tick_params(labelbottom=True)
        row[0].set_ylabel(_TITLES[measure])
        curve = _curve(setup, measure)
        _fit_upward(row[0], paths, measure, curve)
        if curve:
            _draw_ceiling(row[0], curve)
        _name_what_is_below(row[0], paths, measure)
        for axis, x in zip(row, _AXES, strict=True):
            named.append(_names(axis, paths, x, measure, curve if x == "kl_to_sft" else []))
    place_labels(figure, named)
    return figure


def _paths(setup: Setup) -> list[Path]:
    """Return every sweep that trades, and every single method; what is to beat comes first."""
    found: list[Path] = []
    colours, blacks = iter(_PALETTE * 4), iter(_TO_BEAT * 4)
    for setting in [name for name in swept_settings(setup) if name in _TRADES]:
        for label, _, points in lines_of(setup, setting):
            rows, values = [row for _, row in points], [value for value, _ in points]
            is_to_beat = rows[0]["is_to_beat"]
            colour = next(blacks if is_to_beat else colours)
            marker = "o" if is_to_beat else _MARKERS[len(found) % len(_MARKERS)]
            found.append(Path(label, setting, rows, values, colour, marker, is_to_beat))
    for row in setup["methods"]:
        if row["swept"] is None:
            plain = _PLAIN.get(row["method"])
            colour = plain or next(colours)
            marker = "*" if plain else _MARKERS[len(found) % len(_MARKERS)]
            found.append(Path(row["label"], None, [row], [], colour, marker, False))
    return sorted(found, key=lambda path: not path.is_to_beat)


def _draw_paths(axis: Axes, paths: Sequence[Path], x: str, y: str) -> None:
    for path in reversed(paths):
        points = path.points(x, y)
        for at, value, row, _ in points:
            ends = row["metrics"][y]
            axis.plot([at, at], [ends["low"], ends["high"]], color=path.colour, lw=0.8, alpha=0.6)
            is_bound = x == "kl_to_sft" and row["kl_kind"] != "exact"
            axis.plot(
                at,
                value,
                path.marker,
                color=path.colour,
                markerfacecolor="white" if is_bound else path.colour,
                markersize=12 if path.marker == "*" else 7 if path.is_to_beat else 5.5,
                zorder=4,
            )
        axis.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            color=path.colour,
            linewidth=3.2 if path.is_to_beat else 1.5,
            zorder=3,
        )


def _fit_across(axes: Sequence[Axes], paths: Sequence[Path], measures: Sequence[str]) -> None:
    """Set the limits of divergence and of cost, so that every path is seen up to its best."""
    for axis, x in zip(axes, _AXES, strict=True):
        found = [points for y in measures for path in paths if (points := path.points(x, y))]
        if not found:
            continue
        if x == "token_forwards":
            costs = [point[0] for points in found for point in points]
            left, right = min(costs), max(costs)
            axis.set_xscale("log")
            # Three numbers a decade where there are few decades: more would lie over one another.
            numbers = (1.0, 2.0, 5.0) if right < 50 * left else (1.0,)
            axis.xaxis.set_major_locator(LogLocator(subs=numbers, numticks=20))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlim(left / 1.35, right * (right / left) ** 0.16 * 1.3)
        else:
            right = max(max(points, key=lambda point: point[1])[0] for points in found)
            axis.set_xlim(-0.03 * right, right * 1.16 + 0.1)


def _fit_upward(axis: Axes, paths: Sequence[Path], y: str, curve: list[CeilingPoint]) -> None:
    """Set the limits of a reward."""
    by_path = {
        path: own
        for path in paths
        if (own := [row["metrics"][y] for row in path.rows if y in row["metrics"]])
    }
    floors = []
    for path, own in by_path.items():
        values = sorted(one["value"] for one in own)
        # Lines come in from below: with all their beginnings on the axis, what is compared would
        # share a tenth of it. What is to beat is seen from its second point on.
        floors.append(values[min(1, len(values) - 1)] if path.is_to_beat else values[-1])
        if path.rows[0]["method"] == "sft":
            floors.pop()
    if floors:
        low, high = min(floors), max(one["high"] for own in by_path.values() for one in own)
        right = axis.get_xlim()[1]
        high = max([high, *(p.value for p in curve if p.is_trusted and p.kl <= right)])
        axis.set_ylim(low - 0.12 * (high - low), high + 0.1 * (high - low))


def _name_what_is_below(axis: Axes, paths: Sequence[Path], y: str) -> None:
    """Say what does not reach the lower end of the axis."""
    bottom, below = axis.get_ylim()[0], []
    for path in paths:
        values = [row["metrics"][y]["value"] for row in path.rows if y in row["metrics"]]
        if values and max(values) < bottom:
            below.append(f"{path.label} {max(values):.2f}")
    if below:
        axis.text(
            *(0.99, 0.02),
            f"below: {', '.join(below)}",
            transform=axis.transAxes,
            ha="right",
            fontsize=8.5,
            color="#6a6a6a",
            style="italic",
        )


def _curve(setup: Setup, measure: str) -> list[CeilingPoint]:
    curves = (setup["ceiling"] or {"curves": {}})["curves"]
    return read_curve(curves.get(measure, []))


def _draw_ceiling(axis: Axes, curve: Sequence[CeilingPoint]) -> None:
    """Shade what no decoder reaches; where few texts carry the weights the edge is dashed."""
    limits, top = axis.get_xlim(), axis.get_ylim()[1]
    known = [point for point in curve if point.is_trusted]
    # The parts share a point, so that the edge has no gap.
    rest = curve[max(0, len(known) - 1) :]
    for part, style, shade in ((known, "-", 1.0), (rest, (0, (2, 2)), 0.45)):
        kls, values = [point.kl for point in part], [point.value for point in part]
        axis.plot(kls, values, color="#8f8f8f", linestyle=style, linewidth=1.4, zorder=2)
        axis.fill_between(kls, values, top, color=_BEYOND, alpha=shade, linewidth=0, zorder=0.5)
    axis.set_xlim(limits)
    axis.text(
        *(0.02, 0.98),
        "out of reach",
        transform=axis.transAxes,
        va="top",
        fontsize=8.5,
        color="#6a6a6a",
        style="italic",
    )


def _names(
    axis: Axes, paths: Sequence[Path], x: str, y: str, curve: Sequence[CeilingPoint]
) -> Panel:
    """Return the names that a panel needs: one a path, and n along what is to beat."""
    labels, numbers = [], []
    bottom, right = axis.get_ylim()[0], axis.get_xlim()[1]
    obstacles = [[(point.kl, point.value) for point in curve]]
    for path in paths:
        points = [p for p in path.points(x, y) if p[1] >= bottom and p[0] <= right]
        if not points:
            continue
        places = [(at, value) for at, value, _, _ in points]
        obstacles.append(places)
        # The far end first: lines meet near the SFT model.
        ends = sorted({places[0], places[-1]}, reverse=True)
        if path.is_to_beat:
            ends = ends[:1]
        labels.append(
            Label(
                _name(path, x, y),
                path.colour,
                ends,
                weight="bold" if path.is_to_beat else "normal",
            )
        )
        if path.is_to_beat:
            # Every second n is enough where there are many.
            every = 2 if len(points) > 4 else 1
            numbers += [
                Label(f"{value:g}", path.colour, [place], size=7.0)
                for place, (*_, value) in list(zip(places, points, strict=True))[::-every]
            ]
    return Panel(axis, [*labels, *numbers], obstacles)


def _name(path: Path, x: str, y: str) -> str:
    """Return the name of a path, and for a sweep its setting from the left end to the right."""
    points = path.points(x, y)
    if path.setting is None or path.is_to_beat or len(points) < 2:
        return path.label
    left, right = sorted([points[0], points[-1]], key=lambda point: point[0])
    return f"{path.label}, {path.setting} {left[3]:g}…{right[3]:g}"


def over_best_of_n(setup: Setup) -> Figure:
    """Draw what every method has over each line of best of n at equal token-forwards."""
    labels = {row["name"]: row["label"] for row in setup["methods"]}
    comparisons = setup["equal_cost"]
    measures = [
        name
        for name in _TITLES
        if any(name in one["measures"] for part in comparisons for one in part["methods"])
    ]
    names = [one["name"] for one in comparisons[0]["methods"]]
    size = (2.6 + 4.2 * len(measures), 1.3 + 0.34 * len(names))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axis, measure in zip(panels, measures, strict=True):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(True, axis="x", **GRID)
        axis.set_axisbelow(True)
        axis.axvline(0.0, color="#b9b9b9", linewidth=3.0, zorder=1)
        for place, comparison in enumerate(comparisons):
            shift = 0.3 * (place - (len(comparisons) - 1) / 2)
            _draw_over(axis, comparison, names, measure, _TO_BEAT[place % 2], shift)
        axis.set_xlabel(f"{_TITLES[measure]} over best of n at equal token-forwards")
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), [labels[name] for name in names])
    found = {
        one["measures"][m]["kind"]
        for part in comparisons
        for one in part["methods"]
        for m in one["measures"]
    }
    for kind, text in _KIND_NAMES.items():
        if kind in found:
            panels[0].plot([], [], _KIND_MARKERS[kind], color="#b9b9b9", label=text)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_over(
    axis: Axes,
    comparison: Mapping[str, Any],
    names: Sequence[str],
    measure: str,
    colour: str,
    shift: float,
) -> None:
    axis.plot([], [], "o-", color=colour, label=f"against {comparison['line']}")
    for one in comparison["methods"]:
        found = one["measures"].get(measure)
        if found is None or one["name"] not in names:
            continue
        place, over = names.index(one["name"]) + shift, found["over"]
        axis.plot([over["low"], over["high"]], [place, place], color=colour, linewidth=2.0)
        axis.plot(
            over["value"],
            place,
            _KIND_MARKERS[found["kind"]],
            color=colour,
            markersize=6.5,
        )
