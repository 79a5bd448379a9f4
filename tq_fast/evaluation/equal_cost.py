"""Methods against best of n at equal cost, in tokens that went through all models.

Best of n from one source with several n is a line: cost against reward. Between two n the reward is
taken to be linear in the logarithm of the cost, prompt by prompt. A method that costs less than the
cheapest n is held against that one, which spends more: its advantage is at least the difference.
One that costs more than the dearest n is held against that one: the advantage is at most it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .ceiling import MEASURES
from .intervals import Bootstrap, Cells, Interval

Kind: TypeAlias = Literal["equal", "at least", "at most"]
_MARKS: Mapping[Kind, str] = {"equal": "", "at least": "≥ ", "at most": "≤ "}
_BOUND = {-1: "≤ ", 0: "", 1: "≥ "}


class CostPoint(NamedTuple):
    """Responses of one method and what one of them costs on average, in token-forwards."""

    cost: float
    cells: Cells


def over_line(
    ours: CostPoint, line: Sequence[CostPoint], bootstrap: Bootstrap
) -> tuple[Interval, Kind, float] | None:
    """Return the mean of ours minus that of the line at the cost of ours.

    Args:
        ours: a method.
        line: best of n with different n.
        bootstrap: of the interval; the pairs are the (prompt, seed) that all of them have.

    Returns:
        The difference, what it is at equal cost, and the mean of the line there; None where no
        response is shared.
    """
    line = sorted(line, key=lambda point: point.cost)
    costs = [point.cost for point in line]
    position = float(np.interp(np.log(ours.cost), np.log(costs), np.arange(len(line))))
    first = min(int(position), len(line) - 1)
    second = min(first + 1, len(line) - 1)
    share = position - first
    theirs = {
        cell: (1 - share) * value + share * line[second].cells[cell]
        for cell, value in line[first].cells.items()
        if cell in line[second].cells
    }
    found = bootstrap.difference(ours.cells, theirs)
    if found is None:
        return None
    kind: Kind = "equal"
    if ours.cost < costs[0]:
        kind = "at least"
    elif ours.cost > costs[-1]:
        kind = "at most"
    shared = [value for cell, value in theirs.items() if cell in ours.cells]
    return found, kind, float(np.mean(shared))


class CostRatio(NamedTuple):
    """How many times the tokens of a method the line needs for the same mean.

    The numbers of `beyond` belong to value, low and high: 1 where the line never gets there, so
    that the ratio is at least the number; -1 where its cheapest point is past it; 0 between.
    """

    value: float
    low: float
    high: float
    beyond: tuple[int, int, int]


def cost_ratio(
    ours: CostPoint, line: Sequence[CostPoint], bootstrap: Bootstrap
) -> CostRatio | None:
    """Return the cost of the line at the mean of ours, divided by the cost of ours.

    The interval comes from resamples of the prompts, the same for both sides.
    """
    line = sorted(line, key=lambda point: point.cost)
    shared = set(ours.cells).intersection(*(point.cells for point in line))
    if not shared:
        return None
    logs = np.log([point.cost for point in line])

    def reach(mean: float, means: np.ndarray) -> tuple[float, int]:
        # A resample in which a larger n has a lower mean counts as reaching no more than before.
        rising = np.maximum.accumulate(means)
        log_cost = np.interp(mean, rising, logs)
        beyond = 1 if mean > rising[-1] else -1 if mean < rising[0] else 0
        return float(np.exp(log_cost) / ours.cost), beyond

    def shared_part(cells: Cells) -> Cells:
        return {cell: cells[cell] for cell in shared}

    parts = [shared_part(cells) for cells in (ours.cells, *(point.cells for point in line))]
    mean, *means = (np.mean(list(part.values())) for part in parts)
    drawn, *line_drawn = (bootstrap.resample(part) for part in parts)
    reached = sorted(map(reach, drawn, np.stack(line_drawn, axis=1)))
    low, high = (reached[round(share * (len(reached) - 1))] for share in (0.025, 0.975))
    value = reach(float(mean), np.array(means))
    return CostRatio(value[0], low[0], high[0], (value[1], low[1], high[1]))


def compare_setup(
    rows: Sequence[Mapping[str, Any]],
    cells: Mapping[str, Mapping[str, Cells]],
    lines: Mapping[str, Sequence[str]],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """Return the comparison of all methods of a set-up with every line of best of n.

    Args:
        rows: of the summary.
        cells: the responses' values by method and measure ("reward", "gold").
        lines: names of the methods that form a line, by its label.
        bootstrap: of the intervals.
    """
    costs = {
        row["name"]: row["metrics"]["token_forwards"]["value"]
        for row in rows
        if "token_forwards" in row["metrics"]
    }
    own = set(itertools.chain(*lines.values()))
    comparisons = []
    for label, names in lines.items():
        found = []
        for name in costs.keys() - own:
            measures = {}
            for measure in cells[name]:
                line = [CostPoint(costs[n], cells[n][measure]) for n in names if n in costs]
                one = _compare(CostPoint(costs[name], cells[name][measure]), line, bootstrap)
                if one is not None:
                    measures[measure] = one
            if measures:
                found.append({"name": name, "cost": costs[name], "measures": measures})
        order = [row["name"] for row in rows]
        found.sort(key=lambda one: order.index(one["name"]))
        if found:
            comparisons.append({"line": label, "methods": found})
    return comparisons


def _compare(
    ours: CostPoint, line: Sequence[CostPoint], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    if not line or not ours.cells:
        return None
    difference, ratio = over_line(ours, line, bootstrap), cost_ratio(ours, line, bootstrap)
    if difference is None or ratio is None:
        return None
    found, kind, theirs = difference
    described = {"over": found._asdict(), "kind": kind, "line": theirs}
    return {**described, "cost_ratio": ratio._asdict()}


def read_comparison(
    comparison: Mapping[str, Any], labels: Mapping[str, str]
) -> tuple[str, list[str], list[list[str]]]:
    """Return what a table of a comparison says: a sentence, the titles, and the cells by method.

    Args:
        comparison: one of `compare_setup`.
        labels: what the methods are called, by name.
    """
    known = [one["measures"] for one in comparison["methods"]]
    measures = list(dict.fromkeys(itertools.chain(*known)))
    titles = ["method", "token-forwards"]
    for measure in measures:
        what = MEASURES[measure]
        titles += [f"its {what} there", f"{what} over it", f"its tokens for the same {what}"]
    sentence = (
        f"Against {comparison['line']} at equal token-forwards; ≥ and ≤ where the method is beyond "
        "the n that were run."
    )
    rows = []
    for one in comparison["methods"]:
        cells = [labels[one["name"]], f"{one['cost']:,.0f}"]
        for measure in measures:
            found = one["measures"].get(measure)
            if found is None:
                cells += [""] * 3
            else:
                cells += [f"{found['line']:.2f}", format_over(found), format_ratio(found)]
        rows.append(cells)
    return sentence, titles, rows


def write_comparison(comparison: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return the comparison with one line as a table in Markdown; as `read_comparison`."""
    sentence, titles, rows = read_comparison(comparison, labels)
    lines = [f"{sentence}\n"]
    lines += [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(lines) + "\n"


def format_over(found: Mapping[str, Any]) -> str:
    """Write the difference to a line at equal cost as a cell of a table."""
    value, low, high = (f"{found['over'][end]:+.2f}" for end in ("value", "low", "high"))
    return f"{_MARKS[found['kind']]}{value} [{low}, {high}]"


def format_ratio(found: Mapping[str, Any]) -> str:
    """Write how many times the tokens a line needs as a cell of a table."""
    ratio = found["cost_ratio"]
    ends = zip(("value", "low", "high"), ratio["beyond"], strict=True)
    value, low, high = (f"{_BOUND[beyond]}{ratio[end]:.2g}x" for end, beyond in ends)
    return f"{value} [{low}, {high}]"
