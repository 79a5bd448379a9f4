"""`RowMap` against caches that are lists of tokens: every roll-out's row holds what it drew."""

from __future__ import annotations

import pytest
import torch

from tq_fast.rollouts.rows import RowMap
from tq_fast.rollouts.state import RolloutState

TREES = [0, 0, 0, 0, 1, 1, 1, 3, 3, 3, 3, 3]
# Each candidate is a row where equal roll-outs share one: row -> roll-outs.
SHARED = [0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4]
DEPTHS = 6


class Forest:
    """Draws tokens for a map of roll-outs and keeps what each row of a cache would hold."""

    def __init__(self, row_of: list[int] | None, seed: int, vocab: int = 3) -> None:
        num = len(TREES)
        self.state = RolloutState.begin(
            torch.arange(num),
            torch.full((num,), DEPTHS),
            torch.tensor(TREES),
            num_tokens=DEPTHS,
            columns=["origin"],
        )
        shared = None if row_of is None else torch.tensor(row_of)
        self.rows = RowMap(self.state, shared, 0 if row_of is None else row_of[-1] + 1)
        self.cache: list[list[int]] = [[] for _ in range(num)]
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab

    def draw(self, depth: int) -> None:
        """A token for each that runs; one in eight ends there."""
        state, num = self.state, self.rows.num_active
        running = ~state.finished[:num]
        ids = torch.randint(self.vocab, (num,), generator=self.generator)
        state.tokens[:num, depth] = torch.where(running, ids, state.tokens[:num, depth])
        state.columns["origin"][:num, depth] = state.origin[:num].float()
        state.lengths[:num] += running
        state.finished[:num] |= torch.rand(num, generator=self.generator) < 1 / 8

    def take_rows(self, order: torch.Tensor | None) -> None:
        if order is not None:
            moved = [list(self.cache[row]) for row in order.tolist()]
            self.cache[: len(moved)] = moved

    def forward(self, depth: int) -> None:
        """Return what a forward pass stores: the token of each row."""
        for row, token in enumerate(self.rows.tokens(depth).tolist()):
            self.cache[row].append(token)

    def check(self, depth: int) -> None:
        """The rows are those of the active roll-outs, and ascend by tree."""
        rows, state = self.rows, self.state
        assert rows.tree.equal(rows.tree.sort().values)
        assert rows.tree[rows.row_of].equal(state.tree[: rows.num_active])
        assert state.keys.equal(state.origin)
        assert state.tree.equal(torch.tensor(TREES)[state.origin])
        written = state.columns["origin"][:, 0]
        assert written.equal(state.origin.float()), "columns move with their roll-outs"
        for i, row in enumerate(rows.row_of.tolist()):
            assert self.cache[row][: depth + 1] == state.tokens[i, : depth + 1].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_rollouts_of_one_row_part_where_they_drew_different_tokens(seed: int) -> None:
    forest = Forest(SHARED, seed)
    rows, state = forest.rows, forest.state
    assert rows.is_shared and rows.leaders.tolist() == [0, 3, 4, 7, 9]
    for depth in range(DEPTHS):
        forest.draw(depth)
        if not rows.is_shared:
            break
        forest.take_rows(rows.split(depth))
        forest.forward(depth)
        forest.check(depth)
        assert not state.finished[: rows.num_active].any()
        assert state.finished[rows.num_active :].all()
        texts = {
            (SHARED[origin], *tokens)
            for origin, tokens in zip(
                state.origin[: rows.num_active].tolist(),
                state.tokens[: rows.num_active, : depth + 1].tolist(),
                strict=True,
            )
        }
        assert len(texts) == len(rows.leaders), "equal roll-outs share a row"


@pytest.mark.parametrize("seed", range(20))
def test_finished_rollouts_leave_once_a_quarter_is_idle(seed: int) -> None:
    forest = Forest(None, seed)
    rows, state = forest.rows, forest.state
    for depth in range(DEPTHS):
        forest.draw(depth)
        before = rows.num_active
        running = int((~state.finished[:before]).sum())
        forest.take_rows(rows.compact())
        assert rows.num_active == (running if running <= 0.75 * before else before)
        if not rows.num_active:
            break
        forest.forward(depth)
        forest.check(depth)
    assert state.places[state.origin].equal(torch.arange(len(TREES)))


@pytest.mark.parametrize("seed", range(20))
def test_rollouts_that_join_keep_their_row_and_stand_in_their_tree(seed: int) -> None:
    forest = Forest(None, seed)
    rows, state = forest.rows, forest.state
    joining = [2, 8]
    forest.draw(0)
    state.finished[joining] = True
    first = {i: state.tokens[i, 0].item() for i in joining}
    for row, token in enumerate(state.tokens[:, 0].tolist()):
        forest.cache[row].append(token)
    forest.take_rows(rows.compact(most_idle=0.0))
    assert not state.finished[: rows.num_active].any()
    running = set(state.origin[: rows.num_active].tolist())
    forest.take_rows(rows.join(joining))
    assert set(state.origin[: rows.num_active].tolist()) == running | set(joining)
    forest.check(0)
    for i in joining:
        assert forest.cache[int(state.places[i])] == [first[i]]


def test_nothing_is_moved_where_nobody_has_to() -> None:
    forest = Forest(None, seed=0)
    assert forest.rows.compact(most_idle=0.0) is None
    forest.state.finished[-3:] = True
    assert forest.rows.compact() is None and forest.rows.num_active == len(TREES) - 3
    shared = Forest(SHARED, seed=0)
    assert shared.rows.split(0) is None and shared.rows.row_of.tolist() == SHARED


def test_a_state_is_copied_as_far_as_both_reach() -> None:
    small = RolloutState.begin(*torch.tensor([[7, 8], [2, 1], [0, 1]]), num_tokens=2)
    large = RolloutState.begin(*torch.tensor([[0] * 3, [4] * 3, [5] * 3]), num_tokens=4)
    small.tokens.fill_(9)
    small.copy_to(large)
    assert large.tokens.tolist() == [[9, 9, 0, 0], [9, 9, 0, 0], [0, 0, 0, 0]]
    assert large.keys.tolist() == [7, 8, 0] and large.tree.tolist() == [0, 1, 5]
    large.tokens.fill_(3)
    large.copy_to(small)
    assert small.tokens.tolist() == [[3, 3], [3, 3]]
