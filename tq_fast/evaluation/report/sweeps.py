"""Pictures of sweeps: ablations, the reward/KL frontier, and the quality of Q against n."""

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
    lines = _lines(setup, setting)
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


def frontier(setup: Setup) -> Figure:
    """Draw reward against KL to SFT: every sweep a line, every other method a point."""
    figure, axes = new_figure(8.8, 4.6)
    axis = axes[0]
    for setting in swept_settings(setup):
        if setting not in ("alpha", "n", "mix"):
            continue
        for place, (label, method, points) in enumerate(_lines(setup, setting)):
            _draw_path(axis, label, method, setting, points, place)
    for row in setup["methods"]:
        found = row["metrics"]
        if row["swept"] is None and {"kl_to_sft", "reward"} <= found.keys():
            at = found["kl_to_sft"]["value"], found["reward"]["value"]
            is_plain = row["method"] in ("sft", "baseline")
            marker = "*" if is_plain else "o"
            axis.plot(
                *at,
                marker,
                color=colour_of(row["method"]),
                markersize=13 if is_plain else 7,
                label=row["label"],
                linestyle="none",
                zorder=4,
            )
    axis.margins(x=0.12, y=0.08)
    axis.set_xlabel("KL to SFT (nats a response)")
    axis.set_ylabel("average target reward")
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def has_frontier(setup: Setup) -> bool:
    """Return whether a set-up sweeps a setting that trades reward for KL."""
    return any(setting in ("alpha", "n", "mix") for setting in swept_settings(setup))


def estimate_quality(setup: Setup) -> Figure:
    """Draw effective sample size and standard error of Q against the number of roll-outs."""
    figure, axes = new_figure(8.6, 3.6, 2)
    lines = _lines(setup, "num_rollouts")
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


def _lines(setup: Setup, setting: str) -> list[Line]:
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


def _draw_path(
    axis: Axes,
    label: str,
    method: str,
    setting: str,
    points: Sequence[tuple[float, Row]],
    place: int,
) -> None:
    known = [
        (value, row["metrics"]["kl_to_sft"]["value"], row["metrics"]["reward"])
        for value, row in points
        if {"kl_to_sft", "reward"} <= row["metrics"].keys()
    ]
    if not known:
        return
    is_bound = points[-1][1]["kl_kind"] != "exact"
    x = [kl for _, kl, _ in known]
    y = [found["value"] for _, _, found in known]
    errors = [
        [found["value"] - found["low"] for _, _, found in known],
        [found["high"] - found["value"] for _, _, found in known],
    ]
    colour = colour_of(method)
    near, far = (choose(known, key=lambda point: point[1])[0] for choose in (min, max))
    suffix = f", {setting} {near:g} to {far:g}" + (" (KL: at most)" if is_bound else "")
    axis.errorbar(
        x,
        y,
        yerr=errors,
        color=colour,
        marker=marker_of(place),
        markersize=5,
        markerfacecolor="white" if is_bound else colour,
        linestyle="--" if is_bound else "-",
        linewidth=1.5,
        elinewidth=0.8,
        label=f"{label}{suffix}",
    )
    # The far end alone has a name: near the SFT model lines meet, and names would overlap.
    value, kl, found = max(known, key=lambda point: point[1])
    axis.annotate(
        f"{setting} {value:g}",
        (kl, found["value"]),
        xytext=(6, -2),
        textcoords="offset points",
        fontsize=8,
        color=colour,
        va="top",
    )


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, names = axis.get_legend_handles_labels()
    if handles:
        options: dict[str, Any] = {"frameon": False, "fontsize": 9, "ncols": min(4, len(names))}
        figure.legend(handles, names, loc="outside lower center", **options)


def describe(setting: str) -> str:
    """Return a setting in words."""
    return _NAMES.get(setting, setting)
