"""Bootstrap intervals of means, differences and ratios over prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# Values by (prompt, seed).
Cells = Mapping[tuple[int, int], float]


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Percentile bootstrap with a fixed seed.

    The resampling unit is the prompt with the responses of all its seeds: seeds of one prompt are
    no independent evidence about prompts, and their own noise is part of what differs between
    prompts. With a single prompt the unit is the response. Every quantity uses the same resamples,
    so that two methods are compared on the same prompts.

    Args:
        num_resamples: resamples to draw.
        seed: of the draw.
    """

    def __init__(self, num_resamples: int = 2000, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed

    def mean(self, cells: Cells) -> Interval | None:
        """Return the mean over all responses; None where there is none."""
        return self._interval(cells, cells, lambda ours, _: ours) if cells else None

    def difference(self, ours: Cells, theirs: Cells) -> Interval | None:
        """Return the mean of ours minus theirs over the (prompt, seed) that both have."""
        first, second = _shared(ours, theirs)
        return self._interval(first, second, np.subtract) if first else None

    def ratio(self, ours: Cells, theirs: Cells) -> Interval | None:
        """Return mean of ours over mean of theirs; None unless theirs is always above 0.

        Always means in every resample: a ratio to a mean that may be 0 or negative orders nothing.
        """
        first, second = _shared(ours, theirs)
        if not first or self.resample(second).min() <= 0.0 or np.mean(list(second.values())) <= 0:
            return None
        return self._interval(first, second, np.divide)

    def _interval(self, ours: Cells, theirs: Cells, combine: Callable[..., Any]) -> Interval:
        value = combine(np.mean(list(ours.values())), np.mean(list(theirs.values())))
        drawn = combine(self.resample(ours), self.resample(theirs))
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Interval(float(value), float(low), float(high))

    def resample(self, cells: Cells) -> np.ndarray:
        """Return means `[num_resamples]` over units that were drawn with replacement."""
        units: dict[int, list[float]] = {}
        is_single = len({prompt for prompt, _ in cells}) == 1
        for (prompt, seed), value in sorted(cells.items()):
            units.setdefault(seed if is_single else prompt, []).append(value)
        sums = np.array([sum(values) for values in units.values()])
        counts = np.array([len(values) for values in units.values()])
        # The seed is fixed, so that every quantity over the same number of units uses one draw.
        generator = np.random.default_rng(self.seed)
        drawn = generator.integers(len(sums), size=(self.num_resamples, len(sums)))
        return sums[drawn].sum(1) / counts[drawn].sum(1)


def _shared(ours: Cells, theirs: Cells) -> tuple[Cells, Cells]:
    both = sorted(ours.keys() & theirs.keys())
    return {cell: ours[cell] for cell in both}, {cell: theirs[cell] for cell in both}
