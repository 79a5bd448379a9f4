"""The paper's measures against numbers worked out by hand."""

from __future__ import annotations

import pytest

from tq_fast.evaluation.measures import compare_scores, cosine, diversity, rep_n


def test_rep_n_counts_unique_n_grams_over_n_grams_plus_one() -> None:
    # The 2-grams are a b, b a, a b, b a, a b: two of five are different.
    assert rep_n(["a", "b", "a", "b", "a", "b"], 2) == pytest.approx(100 * (1 - 2 / 6))
    # The 3-grams are a b a, b a b, a b a, b a b: two of four.
    assert rep_n(["a", "b", "a", "b", "a", "b"], 3) == pytest.approx(100 * (1 - 2 / 5))
    assert rep_n(["a", "b", "c", "d"], 2) == pytest.approx(25.0)


def test_rep_n_of_a_text_that_is_too_short_is_100() -> None:
    assert rep_n(["a"], 2) == 100.0
    assert rep_n([], 4) == 100.0


def test_diversity_is_the_product_over_two_to_four_grams() -> None:
    # The 4-grams are a b a b, b a b a, a b a b: two of three; 2- and 3-grams as above.
    assert diversity(["a", "b", "a", "b", "a", "b"]) == pytest.approx((2 / 6) * (2 / 5) * (2 / 4))
    # Five different words have 4, 3 and 2 n-grams, all different.
    assert diversity([7, 8, 9, 10, 11]) == pytest.approx(0.4)


def test_cosine_of_embeddings() -> None:
    assert cosine([3.0, 4.0], [4.0, 3.0]) == pytest.approx(24 / 25)
    assert cosine([1.0, 0.0], [-2.0, 0.0]) == pytest.approx(-1.0)
    assert cosine([0.0, 0.0], [1.0, 2.0]) == 0.0


def test_a_tie_counts_as_won() -> None:
    assert [compare_scores(1.0, other) for other in (0.5, 1.0, 1.5)] == [1.0, 1.0, 0.0]
