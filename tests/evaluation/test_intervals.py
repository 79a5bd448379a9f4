"""Bootstrap intervals: their unit, their pairing, and how often they cover the truth."""

from __future__ import annotations

import numpy as np
import pytest

from tq_fast.evaluation.intervals import Bootstrap


def cells(table: list[list[float]]) -> dict[tuple[int, int], float]:
    return {(p, s): v for p, row in enumerate(table) for s, v in enumerate(row)}


def test_the_estimate_is_the_mean_over_all_responses() -> None:
    found = Bootstrap().mean(cells([[1.0, 2.0], [3.0, 6.0]]))
    assert found.value == pytest.approx(3.0)
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(4.5)


def test_seeds_that_agree_are_no_further_evidence() -> None:
    once = cells([[value] for value in (0.0, 1.0, 2.0, 5.0)])
    often = cells([[value] * 50 for value in (0.0, 1.0, 2.0, 5.0)])
    assert Bootstrap().mean(often) == pytest.approx(Bootstrap().mean(once))


def test_a_single_prompt_is_resampled_by_its_responses() -> None:
    found = Bootstrap().mean(cells([[0.0, 1.0, 2.0, 3.0]]))
    assert found.low < 1.0 < 2.0 < found.high


def test_a_difference_is_taken_on_the_same_prompts() -> None:
    ours = cells([[10.0], [0.0], [-10.0]])
    theirs = {cell: value - 1.0 for cell, value in ours.items()}
    assert Bootstrap().difference(ours, theirs) == pytest.approx((1.0, 1.0, 1.0))
    del theirs[(1, 0)]
    assert Bootstrap().difference(ours, theirs).value == pytest.approx(1.0)


def test_a_ratio_to_a_mean_that_may_not_be_positive_is_not_given() -> None:
    ours = cells([[2.0], [4.0]])
    assert Bootstrap().ratio(ours, cells([[1.0], [2.0]])) == pytest.approx((2.0, 2.0, 2.0))
    assert Bootstrap().ratio(ours, cells([[1.0], [-0.5]])) is None
    assert Bootstrap().ratio(ours, {}) is None


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    table = cells(np.random.default_rng(0).normal(size=(20, 3)).tolist())
    assert Bootstrap(200).mean(table) == Bootstrap(200).mean(table)
    assert Bootstrap(200).mean(table) != Bootstrap(200, seed=1).mean(table)


def test_intervals_cover_the_mean_of_all_prompts_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        prompts = generator.normal(size=(40, 1))
        table = prompts + generator.normal(size=(40, 5))
        found = Bootstrap(300).mean(cells(table.tolist()))
        hits += found.low <= 0.0 <= found.high
    # The nominal coverage is 95 %, with 40 units a little less; 4 standard errors of 300 trials
    # are allowed on either side.
    assert 0.88 <= hits / 300 <= 0.99
