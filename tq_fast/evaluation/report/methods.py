"""Pictures of the methods of a set-up. They need matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results import Records, cells_of, format_number, kl_mark
from .page import probability

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
DPI = 110
# The title of a step shows so many letters of the text before its token.
_CONTEXT = 26
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


def trace_figure(record: Mapping[str, Any], label: str, num_steps: int = 6) -> Figure:
    """Draw the steps of a response that moved furthest from the prior, with Q and the choice."""
    trace = record["trace"]
    by_shift = sorted(range(len(trace)), key=lambda i: -_moved(trace[i]))
    picked = sorted(by_shift[:num_steps])
    columns = 3
    num_rows = -(-len(picked) // columns)
    figure = Figure(figsize=(11.0, 0.6 + 2.5 * num_rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis, idx in zip(axes, picked, strict=False):
        _draw_step(axis, trace, idx)
    for axis in axes[len(picked) :]:
        axis.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{label}: the steps that moved furthest from the prior", fontsize=11)
    return figure


def _draw_step(axis: Axes, trace: Sequence[Mapping[str, Any]], idx: int) -> None:
    step = trace[idx]
    texts = step.get("texts") or [str(token) for token in step["candidates"]]
    places = np.arange(len(texts))
    prior, final = _laws(step)
    axis.barh(places - 0.2, prior, 0.38, color="#b9b9b9", label="prior probability")
    axis.barh(places + 0.2, final, 0.38, color=colour_of("transfer_q"), label="final probability")
    names = []
    for place, text in enumerate(texts):
        mark = "▶ " if place == step["choice"] else ""
        names.append(f"{mark}{text.strip() or repr(text)}  Q {step['q'][place]:+.2f}")
    axis.set_yticks(places, names, fontsize=8.5)
    axis.get_yticklabels()[step["choice"]].set_fontweight("bold")
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    chosen = [s["texts"][s["choice"]] for s in trace[max(0, idx - 4) : idx] if "texts" in s]
    before = "".join(chosen).strip()
    before = before[-_CONTEXT:]
    title = f"token {idx + 1}, after “…{before}”" if before else f"token {idx + 1}"
    # The title is aligned to the right, because it spans the names of the candidates too.
    axis.set_title(title, fontsize=9, loc="right")


def _laws(step: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return prior and final probabilities of the candidates."""
    kinds = ("prior_logprobs", "final_logprobs")
    prior, final = (np.array([probability(value) for value in step[kind]]) for kind in kinds)
    return prior, final


def _moved(step: Mapping[str, Any]) -> float:
    """Return the total variation between the final law and the prior on the candidates."""
    prior, final = _laws(step)
    return float(np.abs(final - prior / prior.sum()).sum() / 2)


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
