"""Methods against best of n at equal cost, on numbers whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from tq_fast.evaluation.equal_cost import (
    CostPoint,
    compare_setup,
    cost_ratio,
    format_over,
    format_ratio,
    over_line,
    write_comparison,
)
from tq_fast.evaluation.intervals import Bootstrap, Cells

PROMPTS = 40
BOOTSTRAP = Bootstrap(500)
COSTS = (10.0, 40.0, 160.0)


def cells(offset: float, *, noise: float = 0.0, seed: int = 0) -> Cells:
    """Return values around those that prompts have by themselves, plus `offset`."""
    own = np.random.default_rng(99).normal(size=PROMPTS)
    own = own + noise * np.random.default_rng(seed).normal(size=PROMPTS)
    return {(idx, 0): float(value) + offset for idx, value in enumerate(own)}


# The reward grows by 1 with every factor of 4 in cost.
LINE = [CostPoint(cost, cells(i)) for i, cost in enumerate(COSTS)]


@pytest.mark.parametrize(
    ("cost", "expected", "kind"),
    [
        (10.0, 1.5, "equal"),
        (20.0, 1.0, "equal"),
        (80.0, 0.0, "equal"),
        (160.0, -0.5, "equal"),
        (5.0, 1.5, "at least"),
        (640.0, -0.5, "at most"),
    ],
)
def test_the_line_is_read_at_the_cost_of_the_method(
    cost: float, expected: float, kind: str
) -> None:
    # The order of the line does not matter.
    found, what, theirs = over_line(CostPoint(cost, cells(1.5)), LINE[::-1], BOOTSTRAP)
    # Prompts differ by themselves, but as much in the method as in the line: the pairs show that.
    assert found == pytest.approx((expected, expected, expected))
    assert what == kind
    mean = sum(cells(1.5).values()) / PROMPTS
    assert theirs == pytest.approx(mean - expected)


def test_the_interval_is_that_of_pairs() -> None:
    ours = CostPoint(20.0, cells(1.5, noise=0.3))
    found, *_ = over_line(ours, LINE, BOOTSTRAP)
    assert found.low < 1.0 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.3 / PROMPTS**0.5, rel=0.35)


@pytest.mark.parametrize(
    ("offset", "cost", "expected", "beyond"),
    [
        (1.0, 40.0, 1.0, 0),
        (1.0, 10.0, 4.0, 0),
        (1.5, 160.0, 0.5, 0),
        (3.0, 16.0, 10.0, 1),
        (-1.0, 20.0, 0.5, -1),
    ],
)
def test_the_ratio_is_the_cost_at_which_the_line_has_the_same_mean(
    offset: float, cost: float, expected: float, beyond: int
) -> None:
    ratio = cost_ratio(CostPoint(cost, cells(offset)), LINE, BOOTSTRAP)
    assert ratio.value == pytest.approx(expected) and ratio.beyond == (beyond,) * 3
    assert (ratio.low, ratio.high) == pytest.approx((expected, expected))


def test_the_interval_of_a_ratio_may_end_beyond_the_line() -> None:
    ratio = cost_ratio(CostPoint(40.0, cells(1.95, noise=0.5)), LINE, BOOTSTRAP)
    assert ratio.low < 4.0 * 4**-0.05 < ratio.high + 1e-9
    assert ratio.beyond[0] in (0, 1) and ratio.beyond[1:] == (0, 1)
    assert ratio.high == pytest.approx(4.0)
    assert format_ratio({"cost_ratio": ratio._asdict()}).endswith(", ≥ 4x]")


def test_a_line_that_falls_in_between_reaches_no_less_than_before() -> None:
    line = [*LINE[:2], CostPoint(80.0, cells(0.5)), LINE[2]]
    ratio = cost_ratio(CostPoint(40.0, cells(0.75)), line, BOOTSTRAP)
    assert ratio.value == pytest.approx(4**0.75 * 10 / 40)


def test_responses_that_are_not_shared_do_not_count() -> None:
    few = CostPoint(20.0, {(3, 0): 5.0, (77, 0): 9.0})
    found, _, theirs = over_line(few, LINE, BOOTSTRAP)
    assert theirs == pytest.approx(cells(0.5)[(3, 0)])
    assert found.value == pytest.approx(5.0 - cells(0.5)[(3, 0)])
    nothing = CostPoint(20.0, {(77, 0): 9.0})
    assert over_line(nothing, LINE, BOOTSTRAP) is None
    assert cost_ratio(nothing, LINE, BOOTSTRAP) is None


def test_every_method_is_compared_with_every_line_that_was_run() -> None:
    costs = {"tq": 20.0, "bon-1": 10.0, "bon-4": 40.0, "other": 5.0}
    values = {"tq": cells(1.0), "bon-1": cells(0.0), "bon-4": cells(1.0), "other": {}}
    rows = [
        {"name": name, "metrics": {"token_forwards": {"value": cost}}}
        for name, cost in costs.items()
    ]
    rows.append({"name": "nothing yet", "metrics": {}})
    measured = {name: {"reward": own, "gold": {}} for name, own in values.items()}
    measured["nothing yet"] = {"reward": {}, "gold": {}}
    lines = {"best of n": ["bon-1", "bon-4"], "not run": ["nothing yet"]}
    (comparison,) = compare_setup(rows, measured, lines, BOOTSTRAP)
    (one,) = comparison["methods"]
    assert (comparison["line"], one["name"], one["cost"]) == ("best of n", "tq", 20.0)
    assert list(one["measures"]) == ["reward"]
    assert format_over(one["measures"]["reward"]) == "+0.50 [+0.50, +0.50]"
    table = write_comparison(comparison, {"tq": "TQ*"})
    half = sum(cells(0.5).values()) / PROMPTS
    assert f"| TQ* | 20 | {half:.2f} | +0.50 [+0.50, +0.50] | 2x [2x, 2x] |" in table
    assert "| its reward there | reward over it | its tokens for the same reward |" in table
