"""Pictures of sweeps: ablations, and the quality of Q against n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import Row, Setup, colour_of, marker_of, new_figure

_NAMES = {
    "alpha": "decoding temperature alpha",
    "k": "candidates a token, k",
    "num_rollouts": "roll-outs a candidate, n",
    "horizon": "tokens a roll-out, L",
    "n": "responses to choose from, n",
    "mix": "mixing weight",
    "stages": "stages of refinement",
    "branches": "texts that are chosen among",
    "beta": "beta",
}
Line = tuple[str, str, list[tuple[float, Row]]]


def swept_settings(setup: Setup) -> list[str]:
    """Return the settings that some method of the set-up sweeps, in their order."""
    settings = [row["swept"][0] for row in setup["methods"] if row["swept"] is not None]
    return list(dict.fromkeys(settings))


def ablation(setup: Setup, setting: str) -> Figure:
    """Draw target reward and KL against one setting, a line a method."""
    has_gold = any("gold" in row["metrics"] for row in setup["methods"])
    shown = {"reward": "average target reward"}
    shown |= {"gold": "average gold reward (points)"} if has_gold else {}
    shown["kl_to_sft"] = "KL to SFT (nats a response)"
    figure, axes = new_figure(3.7 * len(shown), 3.6, len(shown))
    lines = lines_of(setup, setting)
    values = sorted({value for _, _, points in lines for value, _ in points})
    for axis, (name, text) in zip(axes, shown.items(), strict=True):
        _draw_lines(axis, lines, values, name)
        for method, style in (("baseline", "--"), ("sft", ":")):
            _reference(axis, setup, method, name, style)
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlabel(_NAMES.get(setting, setting))
        axis.set_ylabel(text)
    _legend_below(figure, axes[0])
    return figure


def estimate_quality(setup: Setup) -> Figure:
    """Draw effective sample size and standard error of Q against the number of roll-outs."""
    figure, axes = new_figure(8.6, 3.6, 2)
    lines = lines_of(setup, "num_rollouts")
    values = sorted({value for _, _, points in lines for value, _ in points})
    _draw_lines(axes[0], lines, values, "ess")
    axes[0].plot(range(len(values)), values, color="#999999", linestyle=":", label="equal weights")
    axes[0].set_yscale("log", base=2)
    axes[0].set_yticks(values, [f"{value:g}" for value in values])
    axes[0].set_ylabel("effective sample size of a candidate")
    _draw_lines(axes[1], lines, values, "q_stderr")
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("standard error of Q (reward units)")
    for axis in axes:
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.set_xlabel(_NAMES["num_rollouts"])
    _legend_below(figure, axes[0])
    return figure


def lines_of(setup: Setup, setting: str) -> list[Line]:
    """Return (label, preset, points) of every group that sweeps `setting`."""
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in setup["methods"]:
        if row["swept"] is not None and row["swept"][0] == setting:
            groups.setdefault(row["group"], []).append((row["swept"][1], row))
    found = []
    for points in groups.values():
        row = points[0][1]
        label = row["label"].rsplit(f", {setting} = ", 1)[0]
        found.append((label, row["method"], sorted(points, key=lambda point: point[0])))
    return found


def _draw_lines(axis: Axes, lines: Sequence[Line], values: Sequence[float], name: str) -> None:
    """Draw values at equal distances, since they are mostly powers of two; bands are intervals."""
    for place, (label, method, points) in enumerate(lines):
        known = [(values.index(value), row["metrics"].get(name)) for value, row in points]
        known = [(at, found) for at, found in known if found is not None]
        if not known:
            continue
        at = [x for x, _ in known]
        colour = colour_of(method)
        axis.plot(
            at,
            [found["value"] for _, found in known],
            label=label,
            color=colour,
            linewidth=1.8,
            marker=marker_of(place),
            markersize=5,
        )
        low, high = ([found[end] for _, found in known] for end in ("low", "high"))
        axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _reference(axis: Axes, setup: Setup, method: str, name: str, linestyle: str) -> None:
    for row in setup["methods"]:
        if row["method"] == method and row["swept"] is None and name in row["metrics"]:
            value = row["metrics"][name]["value"]
            axis.axhline(
                value,
                label=row["label"],
                color=colour_of(method),
                linestyle=linestyle,
                linewidth=1.3,
            )


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, names = axis.get_legend_handles_labels()
    if handles:
        options: dict[str, Any] = {"frameon": False, "fontsize": 9, "ncols": min(4, len(names))}
        figure.legend(handles, names, loc="outside lower center", **options)


def describe(setting: str) -> str:
    """Return a setting in words."""
    return _NAMES.get(setting, setting)
