"""Draw the results of `make bench`: cost against shape, and the worth of each speed option.

    python -m bench.pictures RESULTS FOLDER

RESULTS is what pytest-benchmark wrote (--benchmark-json), or a .txt of bench/results, of which the
speed options are read. The pictures are FOLDER/decode-shapes.png and FOLDER/speed-options.png. A
picture whose benches did not run is not drawn.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_TITLES = {
    "prompt": "prompt, tokens",
    "k": "candidates k",
    "n": "roll-outs n a candidate",
    "L": "horizon L, tokens",
    "prompts": "prompts together",
}
_COLOURS = {"fp32": "#2563ab", "bf16": "#d9772b"}
_COPIES = "prompt (generate over copies)"
Series = dict[tuple[str, str], list[tuple[int, dict[str, Any]]]]
# A line of bench/test_speed_options.py, as tables keep it.
_OPTION = re.compile(
    r"(?P<option>[a-z_ ]+): (?P<ratio>[\d.]+)x \(.*\), token-forwards of the baseline "
    r"(?P<baseline>[\d.]+)x, of the reward (?P<reward>[\d.]+)x"
)
# What options are called now that had another name when a table was made.
_RENAMED = {"few_rows": "cpu_layers"}


def main(results: Path, folder: Path) -> list[Path]:
    """Draw every picture for which `results` holds something; return their files."""
    text = results.read_text()
    if results.suffix == ".txt":
        records = read_options(text)
    else:
        records = [bench["extra_info"] for bench in json.loads(text)["benchmarks"]]
    series: Series = defaultdict(list)
    for info in records:
        if "axis" in info:
            series[info["axis"], info["dtype"]].append((info["value"], info))
    for points in series.values():
        points.sort(key=lambda point: point[0])
    drawn = []
    if series:
        drawn.append(_draw_shapes(series, folder / "decode-shapes.png"))
    speed = {
        info["option"]: info for info in records if "option" in info and not info.get("cannot_help")
    }
    if speed:
        drawn.append(_draw_speed(speed, folder / "speed-options.png"))
    return drawn


def read_options(table: str) -> list[dict[str, Any]]:
    """Return the speed options of a stored table as the benches record them, by their names now."""
    return [
        {
            "option": _RENAMED.get(found["option"], found["option"]),
            "ratio": float(found["ratio"]),
            "forwards": {role: float(found[role]) for role in ("baseline", "reward")},
        }
        for found in map(_OPTION.fullmatch, table.splitlines())
        if found
    ]


def _draw_shapes(series: Series, file: Path) -> Path:
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.2), constrained_layout=True)
    time_by_prompt, memory, *rest, throughput = grid.flat
    _draw_prompt(time_by_prompt, series, "seconds_per_token", 1e3, "ms a token")
    _draw_prompt(memory, series, "kv_bytes", 2**-20, "KV of the baseline, MiB")
    for axes, axis in zip(rest, ("k", "n", "L"), strict=True):
        _plot(axes, series, axis, "fp32", "seconds_per_token", 1e3)
        _finish(axes, series, axis, "ms a token")
    for dtype in _COLOURS:
        _plot(throughput, series, "prompts", dtype, "tokens_per_second", 1.0)
    _finish(throughput, series, "prompts", "tokens a second")
    # Leave room for the legend above the lines.
    time_by_prompt.set_ylim(top=10 * time_by_prompt.get_ylim()[1])
    time_by_prompt.legend(fontsize=8, loc="upper left")
    figure.suptitle(
        "Time and memory of a decode, 134 M baseline and reward; others: prompt 128, k 10, n 1, "
        "L 20, one prompt",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _draw_prompt(axes: Axes, series: Series, key: str, scale: float, label: str) -> None:
    for dtype in _COLOURS:
        _plot(axes, series, "prompt", dtype, key, scale)
        _plot(axes, series, _COPIES, dtype, key, scale)
    axes.set_yscale("log")
    _finish(axes, series, "prompt", label)


def _plot(axes: Axes, series: Series, axis: str, dtype: str, key: str, scale: float) -> None:
    points = series.get((axis, dtype), [])
    if points:
        is_ours = axis != _COPIES
        axes.plot(
            [value for value, _ in points],
            [scale * info[key] for _, info in points],
            marker="o",
            markersize=4,
            linestyle="-" if is_ours else ":",
            color=_COLOURS[dtype],
            label=f"tq_fast, {dtype}" if is_ours else f"generate over copied KV, {dtype}",
        )


def _finish(axes: Axes, series: Series, axis: str, label: str) -> None:
    values = sorted(
        {value for (of, _), points in series.items() if of == axis for value, _ in points}
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(_TITLES[axis], fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_speed(speed: dict[str, dict[str, Any]], file: Path) -> Path:
    names = sorted(speed, key=lambda name: speed[name]["ratio"])
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.4), constrained_layout=True)
    ratios = [speed[name]["ratio"] for name in names]
    forwards = [min(speed[name]["forwards"].values()) for name in names]
    axes.barh(names, ratios, color=["#3b8a5a" if ratio >= 1 else "#b0413e" for ratio in ratios])
    for row, (ratio, share) in enumerate(zip(ratios, forwards, strict=True)):
        axes.text(
            ratio,
            row,
            f" {ratio:.2f}x, token-forwards {100 * share:.0f} %",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.45 * max(ratios))
    axes.set_xlabel("time without the option over time with it, each alone (above 1: it wins)")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


if __name__ == "__main__":
    for picture in main(Path(sys.argv[1]), Path(sys.argv[2])):
        print(picture)
