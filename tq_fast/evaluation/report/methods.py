"""Pictures of the methods of a set-up. They need matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...results.trace_figure import DPI, furthest_steps
from ...results.trace_figure import trace_figure as draw_trace
from ..results import Records, cells_of, format_number, kl_mark

_COLOURS = {
    "transfer_q": "#1f5fa8",
    "transfer_q_indirect": "#0f8b8d",
    "direct_on_target": "#7a5195",
    "controlled_decoding": "#d9822b",
    "args": "#6a9a3b",
    "best_of_n": "#c0504d",
    "dera": "#8c6d46",
    "baseline": "#333333",
    "sft": "#8a8a8a",
}
_MARKERS = "osD^v<>P"
# How the grid of every panel looks.
GRID = {"color": "#e3e3e3", "linewidth": 0.8}

Row = Mapping[str, Any]
Setup = Mapping[str, Any]


def colour_of(method: str) -> str:
    """Return the colour of a preset in every picture."""
    return _COLOURS.get(method, "#444444")


def marker_of(position: int) -> str:
    """Return a marker for the `position`-th line of one colour."""
    return _MARKERS[position % len(_MARKERS)]


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of `columns` panels side by side, in inches, in the style of the report."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, **GRID)
        axis.set_axisbelow(True)
    return figure, list(axes)


def plain_rows(setup: Setup) -> list[Row]:
    """Return the methods of a set-up that are not part of a sweep."""
    return [row for row in setup["methods"] if row["swept"] is None]


def reward_by_method(setup: Setup) -> Figure:
    """Draw the average reward of every method with its interval, and the gold reward if known."""
    rows = plain_rows(setup)
    has_gold = any("gold" in row["metrics"] for row in rows)
    figure, axes = new_figure(9.0 if has_gold else 6.2, _height(rows), 2 if has_gold else 1)
    _dots(axes[0], rows, "reward", "average target reward")
    if has_gold:
        _dots(axes[1], rows, "gold", "average gold reward (points)", with_names=False)
    return figure


def quality_by_method(setup: Setup) -> Figure:
    """Draw diversity, coherence and divergence of every method."""
    rows = plain_rows(setup)
    shown = {
        "diversity": "diversity (0 to 1)",
        "coherence": "coherence (mean cosine)",
        "kl_to_sft": "KL to SFT (nats a response)",
    }
    shown = {name: text for name, text in shown.items() if any(name in r["metrics"] for r in rows)}
    figure, axes = new_figure(2.0 + 3.2 * len(shown), _height(rows), len(shown))
    for i, (name, text) in enumerate(shown.items()):
        _dots(axes[i], rows, name, text, with_names=i == 0)
    return figure


def reward_shift(setup: Setup, records: Mapping[str, Records]) -> Figure:
    """Draw how the target reward and the baseline's own differ, over samples of both models."""
    figure, axes = new_figure(11.0, 3.7, 3)
    names = {row["method"]: row["name"] for row in plain_rows(setup)}
    sampled = {
        method: _pairs(records[names[method]]) for method in ("sft", "baseline") if method in names
    }
    source = "sft" if "sft" in sampled else "baseline"
    own, target = sampled[source]
    axes[0].scatter(own, target, s=9, alpha=0.35, color=colour_of(source), linewidths=0)
    axes[0].set_xlabel("baseline's reward r_BL")
    axes[0].set_ylabel("target reward r")
    title = f"samples of {'the SFT model' if source == 'sft' else 'the baseline'}"
    axes[0].set_title(f"{title}: rank correlation {rank_correlation(own, target):.2f}", fontsize=10)
    for axis, idx, text in (
        (axes[1], 0, "baseline's reward r_BL"),
        (axes[2], 1, "target reward r"),
    ):
        everything = np.concatenate([pair[idx] for pair in sampled.values()])
        edges = np.linspace(everything.min(), everything.max(), 25)
        for method, pair in sampled.items():
            label = {"sft": "SFT", "baseline": "baseline"}[method]
            colour = colour_of(method)
            axis.hist(
                pair[idx],
                edges.tolist(),
                density=True,
                histtype="step",
                label=label,
                color=colour,
                linewidth=1.8,
            )
            axis.axvline(pair[idx].mean(), linestyle="--", color=colour, linewidth=1.2)
        axis.set_xlabel(text)
        axis.set_ylabel("density")
        axis.set_title("dashed: means", fontsize=10)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def trace_figure(record: Mapping[str, Any], label: str) -> Figure:
    """Draw the steps of a response that moved furthest from the prior, with Q and the choice."""
    trace = record["trace"]

    def before(idx: int) -> str:
        steps = trace[max(0, idx - 4) : idx]
        return "".join(step["texts"][step["choice"]] for step in steps if "texts" in step)

    title = f"{label}: the steps that moved furthest from the prior"
    return draw_trace(trace, title, furthest_steps(trace), before)


def _height(rows: Sequence[Row]) -> float:
    return 0.95 + 0.33 * len(rows)


def _dots(
    axis: Axes, rows: Sequence[Row], name: str, text: str, *, with_names: bool = True
) -> None:
    """Draw one row a method: the estimate, its interval, and the number."""
    ends = []
    for place, row in enumerate(rows):
        found = row["metrics"].get(name)
        if found is None:
            continue
        value, colour = found["value"], colour_of(row["method"])
        ends += [found["low"], found["high"]]
        axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2.2)
        mark = kl_mark(row, name)
        face = "white" if mark else colour
        axis.plot(value, place, "o", color=colour, markerfacecolor=face, markersize=6.5)
        number = mark + format_number(value, 2)
        axis.annotate(
            number,
            (found["high"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    low, high = min(ends), max(ends)
    # The axis is longer on the right, where the numbers stand.
    axis.set_xlim(low - 0.06 * (high - low), high + 0.24 * (high - low))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows] if with_names else [])
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(text)
    plain = next((row for row in rows if row["method"] == "baseline"), None)
    if plain is not None and name in plain["metrics"]:
        at = plain["metrics"][name]["value"]
        axis.axvline(at, color="#777777", linestyle=":", linewidth=1.2, zorder=0)


def _pairs(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Return (r_BL, r) of every response that has both."""
    own, target = cells_of(records, "baseline_reward"), cells_of(records, "reward")
    both = sorted(own.keys() & target.keys())
    return np.array([own[cell] for cell in both]), np.array([target[cell] for cell in both])
