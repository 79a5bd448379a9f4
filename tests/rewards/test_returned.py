"""Scores are read in every shape that functions and models return, with the precision they have."""

from __future__ import annotations

import decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tq_fast.rewards.base import WrongScores
from tq_fast.rewards.returned import read_output, read_scores


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 2.5],
        (1, 2.5),
        [[1.0], [2.5]],
        [[[1.0]], (2.5,)],
        np.array([1.0, 2.5]),
        np.array([[1.0], [2.5]], dtype=np.float16),
        [np.float32(1.0), np.array([2.5])],
        torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[1.0], [2.5]], dtype=torch.float64),
        torch.tensor([[1.0, 2.5]], dtype=torch.float16),
        [torch.tensor(1), torch.tensor([2.5])],
        [decimal.Decimal(1), decimal.Decimal("2.5")],
    ],
    ids=lambda returned: f"{type(returned).__name__}",
)
def test_every_form_of_two_scores_is_read(returned: Any) -> None:
    assert read_scores(returned) == [1.0, 2.5]


def test_a_generator_and_a_single_number_are_read() -> None:
    assert read_scores(float(x) for x in (1, 2)) == [1.0, 2.0]
    assert read_scores(np.float64(3.5)) == [3.5]
    assert read_scores(torch.tensor(3.5)) == [3.5]
    assert read_scores([True, False]) == [1.0, 0.0]


def test_no_precision_is_lost_whatever_the_default_dtype_is() -> None:
    exact = 0.1 + 2**-40
    torch.set_default_dtype(torch.bfloat16)
    try:
        for returned in ([exact], np.array([exact]), torch.tensor([exact], dtype=torch.float64)):
            assert read_scores(returned) == [exact]
    finally:
        torch.set_default_dtype(torch.float32)


async def _later() -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (None, "returned None"),
        ("0.5", "returned '0.5'"),
        ({"score": 1.0}, "returned {'score': 1.0}"),
        ([1.0, None], "None as score 1"),
        (["1.0"], "'1.0' as score 0"),
        ([[1.0, 2.0]], r"\[1.0, 2.0\] as score 0"),
        ([{"score": 1.0}], "as score 0"),
        (np.zeros((2, 3)), r"shape \(2, 3\)"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_anything_else_is_named(returned: Any, named: str) -> None:
    with pytest.raises(WrongScores, match=named):
        read_scores(returned)


def test_a_coroutine_is_named() -> None:
    with pytest.raises(WrongScores, match="coroutine"):
        read_scores(_later())


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16),
        SimpleNamespace(logits=torch.tensor([[1.0], [2.0]])),
        SimpleNamespace(score=torch.tensor([1.0, 2.0]), logits=torch.zeros(2, 7, 50)),
        SimpleNamespace(scores=torch.zeros(2, 7, 1), end_scores=torch.tensor([[1.0], [2.0]])),
        {"rewards": torch.tensor([1.0, 2.0])},
        (torch.tensor([[1.0], [2.0]]), "more"),
    ],
)
def test_every_form_of_a_models_output_is_read(output: Any) -> None:
    scores = read_output(output, 2)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1.0], [2.0]]


def test_labels_stay_apart_and_wide_scores_wide() -> None:
    logits = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    assert torch.equal(read_output(SimpleNamespace(logits=logits), 2), logits)


@pytest.mark.parametrize("output", [torch.zeros(2, 7, 50), SimpleNamespace(loss=None), None])
def test_an_output_without_scores_is_named(output: Any) -> None:
    with pytest.raises(WrongScores, match="its forward returns"):
        read_output(output, 2)
