"""advance_rollouts_: the state after a depth is the one that sample_tokens implies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tq_fast.ops import advance_rollouts_, sample_tokens_ref

OP = "advance_rollouts_"
SENTINEL = -777


@dataclasses.dataclass
class State:
    """Roll-outs of N rows; the fields in the order of the op's arguments."""

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    logprob_sums: Tensor
    proposal_logprob_sums: Tensor

    @classmethod
    def new(cls, rows: int, capacity: int, dtype: torch.dtype = torch.int64) -> State:
        return cls(
            torch.full((rows, capacity), SENTINEL, dtype=dtype),
            torch.zeros(rows, dtype=dtype),
            torch.zeros(rows, dtype=torch.bool),
            torch.zeros(rows),
            torch.zeros(rows),
        )

    def fields(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def copy(self) -> State:
        return State(*(field.clone() for field in self.fields()))


EOS = torch.tensor([3, 11])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.0}, {"top_k": 4, "top_p": 0.8}])
def test_several_depths_follow_the_sampler(op, generator, parameters, dtype):
    rows, capacity, size = 40, 6, 24
    state = State.new(rows, capacity, dtype)
    keys = torch.arange(rows)
    texts: list[list[int]] = [[] for _ in range(rows)]
    sums = torch.zeros(rows, 2, dtype=torch.float64)
    done = [False] * rows
    for depth in range(capacity):
        logits = torch.randn(rows, size, generator=generator) * 2
        sampled = sample_tokens_ref(logits, keys, depth, seed=9, **parameters)
        op(logits, keys, depth, *state.fields(), EOS.to(dtype), seed=9, **parameters)
        for row in range(rows):
            if not done[row]:
                token = sampled.ids[row].item()
                texts[row].append(token)
                sums[row, 0] += sampled.logprobs[row]
                sums[row, 1] += sampled.proposal_logprobs[row]
                done[row] = token in EOS.tolist()
    assert any(done) and not all(done)
    assert state.finished.tolist() == done
    assert state.lengths.tolist() == [len(text) for text in texts]
    padded = [text + [SENTINEL] * (capacity - len(text)) for text in texts]
    assert state.tokens.tolist() == padded
    got = torch.stack((state.logprob_sums, state.proposal_logprob_sums), dim=1)
    torch.testing.assert_close(got.double(), sums, rtol=1e-5, atol=1e-4)


def test_a_finished_row_is_untouched_even_by_nan(op):
    state = State.new(3, 4)
    state.finished[1] = True
    state.lengths[1] = 2
    state.tokens[1, :2] = torch.tensor([5, 3])
    state.logprob_sums[1] = -1.25
    before = state.copy()
    logits = torch.zeros(3, 20)
    logits[1] = torch.nan
    op(logits, torch.arange(3), 0, *state.fields(), EOS)
    for now, then in zip(state.fields(), before.fields(), strict=True):
        assert torch.equal(now[1], then[1])
    assert state.lengths.tolist() == [1, 2, 1]


def test_a_row_without_a_valid_logit_finishes_and_shows_nan(op):
    state = State.new(3, 4)
    logits = torch.zeros(3, 20)
    logits[1] = -torch.inf
    op(logits, torch.arange(3), 0, *state.fields(), torch.zeros(0, dtype=torch.int64))
    assert state.finished.tolist() == [False, True, False]
    assert state.logprob_sums.isnan().tolist() == [False, True, False]
    assert state.lengths.tolist() == [1, 0, 1]
    assert (state.tokens[1] == SENTINEL).all()
    # A row that ended without a valid logit stays as it is.
    op(torch.zeros(3, 20), torch.arange(3), 1, *state.fields(), EOS)
    assert state.lengths.tolist() == [2, 0, 2]
    assert state.logprob_sums.isnan().tolist() == [False, True, False]


def test_without_eos_ids_nothing_finishes(op):
    state = State.new(30, 2)
    none = torch.zeros(0, dtype=torch.int64)
    op(torch.zeros(30, 4), torch.arange(30), 0, *state.fields(), none)
    assert not state.finished.any()
    assert (state.lengths == 1).all()


def test_a_full_row_is_left_alone(op):
    state = State.new(2, 3)
    state.lengths[0] = 3
    before = state.copy()
    op(torch.zeros(2, 5), torch.arange(2), 0, *state.fields(), EOS)
    for now, then in zip(state.fields(), before.fields(), strict=True):
        assert torch.equal(now[0], then[0])
    assert state.lengths.tolist() == [3, 1]


@pytest.mark.parametrize("length", [-1, -(2**31), 4, 2**31 - 1])
def test_a_row_whose_length_is_out_of_range_is_left_alone(op, length):
    """Nothing is written before the first slot of a row or behind its last."""
    whole = State.new(5, 9, torch.int32)
    state = State(*(field[1:4] for field in whole.fields()))
    state.tokens = whole.tokens[1:4, 3:6]
    state.lengths[1] = length
    before = state.copy()
    op(torch.zeros(3, 5), torch.arange(3), 0, *state.fields(), EOS)
    for now, then in zip(state.fields(), before.fields(), strict=True):
        assert torch.equal(now[1], then[1])
    assert state.lengths.tolist() == [1, length, 1]
    whole.tokens[1:4, 3] = SENTINEL
    assert (whole.tokens == SENTINEL).all()


def test_state_may_be_a_view_of_larger_buffers_and_nothing_beside_it_is_written(op, generator):
    whole = State.new(6, 8)
    part = State(*(field[1:4] for field in whole.fields()))
    part.tokens = whole.tokens[1:4, 2:5]
    logits = torch.randn(3, 50, generator=generator)
    op(logits, torch.arange(3), 0, *part.fields(), EOS)
    expected = sample_tokens_ref(logits, torch.arange(3), 0)
    assert whole.tokens[1:4, 2].tolist() == expected.ids.tolist()
    whole.tokens[1:4, 2] = SENTINEL
    assert (whole.tokens == SENTINEL).all()
    assert whole.lengths.tolist() == [0, 1, 1, 1, 0, 0]
    assert (whole.logprob_sums[[0, 4, 5]] == 0).all()


def test_padding_of_the_vocabulary_is_never_written(op):
    state = State.new(200, 1)
    logits = torch.zeros(200, 40)
    logits[:, 10:] = 50.0
    op(logits, torch.arange(200), 0, *state.fields(), EOS, vocab_size=10)
    assert (state.tokens < 10).all() and (state.tokens >= 0).all()


def test_rows_advance_alone_as_together(op, generator):
    logits = torch.randn(12, 300, generator=generator)
    keys = torch.arange(12) + 100
    together = State.new(12, 2)
    op(logits, keys, 4, *together.fields(), EOS)
    for rows in (slice(0, 1), slice(5, 9)):
        alone = State.new(logits[rows].shape[0], 2)
        op(logits[rows], keys[rows], 4, *alone.fields(), EOS)
        for a, b in zip(alone.fields(), together.fields(), strict=True):
            assert torch.equal(a, b[rows])


def test_no_rows(op):
    state = State.new(0, 5)
    op(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64), 0, *state.fields(), EOS)
    assert state.tokens.shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(3)}, r"advance_rollouts_: logits .* 2 axes"),
        ({"keys": torch.arange(2)}, r"keys .*\[2\].*= \[3\]"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, r"tokens .*\[2, 4\].*= \[3, 4\]"),
        ({"tokens": torch.zeros(3, 4)}, "tokens is torch.float32"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, r"lengths .*\[4\].*= \[3\]"),
        ({"finished": torch.zeros(3, dtype=torch.int64)}, "finished is torch.int64, expected"),
        ({"finished": torch.zeros(2, dtype=torch.bool)}, r"finished .*\[2\].*= \[3\]"),
        ({"logprob_sums": torch.zeros(3).double()}, "logprob_sums is torch.float64, expected"),
        ({"proposal_logprob_sums": torch.zeros(1)}, r"proposal_logprob_sums .*\[1\].*= \[3\]"),
        ({"eos": torch.zeros(1, 1, dtype=torch.int64)}, "eos .* 1 axes"),
        ({"eos": torch.zeros(1)}, "eos is torch.float32"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"logprob_sums": torch.zeros(3, requires_grad=True)}, "logprob_sums requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    state = State.new(3, 4)
    arguments = {
        "logits": torch.zeros(3, 5),
        "keys": torch.arange(3),
        "step": 0,
        "eos": EOS,
        **{field.name: getattr(state, field.name) for field in dataclasses.fields(state)},
    }
    rejects(words, lambda: advance_rollouts_(**arguments | changes))


def test_compiles_as_one_graph(op, generator):
    logits = torch.randn(5, 40, generator=generator)
    plain, compiled = State.new(5, 3), State.new(5, 3)

    def run(logits, keys, step, seed, *fields):
        op(logits, keys, step, *fields, EOS, seed=seed)

    graph = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for depth in range(2):
        arguments = (logits, torch.arange(5), torch.tensor(depth), torch.tensor(1))
        run(*arguments, *plain.fields())
        graph(*arguments, *compiled.fields())
    for a, b in zip(plain.fields(), compiled.fields(), strict=True):
        torch.testing.assert_close(a, b)
