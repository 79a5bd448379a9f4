"""The table of what was measured, as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.measure import SIDES, Row

_WIDTHS = (38, 12, 12, 8, 8)


def table(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the table: a line a case, then the phases of each step, then what was found equal.

    A line has the tokens a second of the median turns, their ratio, the ratio of the fastest turns,
    and the least and the greatest ratio of one turn.

    `run` says the command, the machine, the versions and the commit, each a line.
    """
    lines = [f"{name}: {value}" if name else str(value) for name, value in run.items()]
    lines += ["", _head()]
    lines += [_line(row) for row in rows]
    lines += ["", *_summary(rows)]
    staged = [row for row in rows if row.phases]
    if staged:
        lines += ["", "ms a step by phase (medians of the turns; each side's own names)"]
        for row in staged:
            lines += _phase_lines(row)
    lines += ["", "compared before any of these figures was printed"]
    lines += [f"{row.case!s:{_WIDTHS[0]}}{row.agreement}" for row in rows]
    return "\n".join(lines) + "\n"


def _head() -> str:
    name, *numbers = _WIDTHS
    heads = (*SIDES, "ratio", "best")
    cells = [f"{text:>{width}}" for text, width in zip(heads, numbers, strict=True)]
    return f"{'tokens a second':{name}}{''.join(cells)}  [least, greatest of the turns]"


def _line(row: Row) -> str:
    name, *numbers = _WIDTHS
    least, greatest = row.spread
    rates = [_number(row.rate(side)) for side in SIDES]
    ratios = [f"{row.ratio:.2f}", f"{row.best_ratio:.2f}"]
    cells = [f"{text:>{w}}" for text, w in zip((*rates, *ratios), numbers, strict=True)]
    return f"{row.case!s:{name}}{''.join(cells)}  [{least:.2f}, {greatest:.2f}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _summary(rows: Sequence[Row]) -> list[str]:
    lost = [row for row in rows if row.ratio < 1]
    said = f"tq_fast is faster in {len(rows) - len(lost)} of {len(rows)} cases"
    if not lost:
        return [said]
    return [said + "; slower in", *(f"  {row.case}: {row.ratio:.2f}" for row in lost)]


def _phase_lines(row: Row) -> list[str]:
    lines = [str(row.case)]
    for side in SIDES:
        phases = {name: s for name, s in row.phases[side].items() if s >= 5e-5}
        step = statistics.median(row.seconds[side])
        cells = [f"{name} {1e3 * seconds:.1f}" for name, seconds in phases.items()]
        lines.append(f"  {side:10}{1e3 * step:9.1f} a step: {', '.join(cells)}")
    return lines
