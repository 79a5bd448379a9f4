"""Rows of different lengths in few passes that pad little."""

from __future__ import annotations

import itertools

import pytest
import torch

from tq_fast.forest import logprobs
from tq_fast.forest.logprobs import split_by_length


def cost(lengths: list[int], passes: list[list[int]], per_pass: int) -> int:
    return sum(per_pass + len(rows) * max(lengths[i] for i in rows) for rows in passes)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_passes_cost_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CPU_PASS", 7)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (6,), generator=generator).tolist()
    passes = split_by_length(lengths, device_type="cpu", max_rows=10)
    assert sorted(itertools.chain(*passes)) == list(range(6))
    assert all(rows == sorted(rows) for rows in passes)
    # Every way to give each row one of three passes.
    others = []
    for choice in itertools.product(range(3), repeat=6):
        groups = [[i for i in range(6) if choice[i] == n] for n in range(3)]
        others.append(cost(lengths, [group for group in groups if group], 7))
    assert cost(lengths, passes, 7) <= min(others)


def test_rows_of_one_length_go_together_and_no_pass_is_too_large() -> None:
    assert split_by_length([5] * 7, device_type="cpu", max_rows=3) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_pass_is_split_where_it_saves_more_than_it_costs() -> None:
    lengths = [40, 1] * 20
    long, short = [i for i in range(40) if i % 2 == 0], [i for i in range(40) if i % 2]
    assert split_by_length(lengths, device_type="cpu", max_rows=99) == [short, long]
    assert split_by_length(lengths, device_type="cuda", max_rows=99) == [list(range(40))]
