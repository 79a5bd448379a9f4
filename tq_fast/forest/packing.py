"""Rows of different lengths in forward passes that pad little."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

# What a forward pass costs beside its tokens, in tokens. On a CPU that is about what reading the
# weights takes; elsewhere, where a pass is hundreds of launches, it is not worth splitting one.
_CPU_PASS, _OTHER_PASS = 48, 4096


def split_by_length(lengths: Sequence[int], *, device_type: str, max_rows: int) -> list[list[int]]:
    """Return the rows of each pass, ascending: together they cost the least.

    A pass of n rows takes n times the longest of them.

    Args:
        lengths: tokens of each row.
        device_type: where the passes run.
        max_rows: rows of one pass, at most.
    """
    counts = Counter(lengths)
    distinct = sorted(counts, reverse=True)
    per_pass = _CPU_PASS if device_type == "cpu" else _OTHER_PASS
    # costs[i]: of the i greatest lengths; cuts[i]: where the last of their passes begins.
    costs, cuts = [0], [0]
    for end in range(1, len(distinct) + 1):
        best, num_rows = None, 0
        for begin in reversed(range(end)):
            num_rows += counts[distinct[begin]]
            cost = costs[begin] + per_pass + num_rows * distinct[begin]
            if best is None or cost < best[0]:
                best = (cost, begin)
        costs.append(best[0])
        cuts.append(best[1])
    bounds = [len(distinct)]
    while bounds[-1]:
        bounds.append(cuts[bounds[-1]])
    passes = []
    for end, begin in itertools.pairwise(bounds):
        wanted = set(distinct[begin:end])
        rows = [i for i, length in enumerate(lengths) if length in wanted]
        passes += [rows[i : i + max_rows] for i in range(0, len(rows), max_rows)]
    return passes
