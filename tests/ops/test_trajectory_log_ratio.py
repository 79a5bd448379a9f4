"""trajectory_log_ratio against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import trajectory_log_ratio

OP = "trajectory_log_ratio"


def exact(logits_p: Tensor, logits_q: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    total = torch.zeros(tokens.shape[0], dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            for sign, logits in ((1, logits_p), (-1, logits_q)):
                total[row] += sign * logits[row, t].double().log_softmax(-1)[tokens[row, t]]
    return total


def problem(generator, rows: int, length: int, size: int, dtype=torch.float32):
    logits = (torch.randn(2, rows, length, size, generator=generator) * 3).to(dtype)
    tokens = torch.randint(0, size, (rows, length), generator=generator)
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    return logits[0], logits[1], tokens, lengths


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerances.TRAJECTORY_REL, atol=tolerances.TRAJECTORY_ABS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 31, 1000, 1024, 4097, 32000, 50257, 128256, 151936])
def test_matches_float64_at_every_size_and_dtype(op, generator, size, dtype):
    inputs = problem(generator, 3, 4, size, dtype)
    close(op(*inputs), exact(*inputs))


def test_128_tokens_of_bf16_logits_lose_nothing_more(op, generator):
    logits_p, logits_q, tokens, _ = problem(generator, 2, 128, 500, torch.bfloat16)
    lengths = torch.tensor([128, 77])
    close(op(logits_p, logits_q, tokens, lengths), exact(logits_p, logits_q, tokens, lengths))


def test_equal_models_cancel(op, generator):
    logits, _, tokens, lengths = problem(generator, 4, 6, 50)
    assert (op(logits, logits.clone(), tokens, lengths) == 0).all()


def test_what_lies_beyond_a_length_is_not_looked_at(op, generator):
    logits_p, logits_q, tokens, _ = problem(generator, 3, 5, 40)
    lengths = torch.tensor([0, 2, 5])
    expected = op(logits_p, logits_q, tokens, lengths)
    beyond = torch.arange(5) >= lengths[:, None]
    logits_p[beyond], logits_q[beyond] = torch.nan, torch.inf
    tokens[beyond] = torch.tensor([-100, 10**9, 40, -1, 2**40, 41, 99, -5])
    got = op(logits_p, logits_q, tokens, lengths)
    assert torch.equal(got, expected)
    assert got[0] == 0


def test_padding_never_enters_and_may_differ_between_the_models(op, generator):
    logits_p, logits_q, tokens, lengths = problem(generator, 3, 5, 40)
    expected = op(logits_p, logits_q, tokens, lengths)
    junk = torch.full((3, 5, 8), 1e30)
    padded_p = torch.cat((logits_p, junk), dim=-1)
    padded_q = torch.cat((logits_q, junk[..., :3] * torch.nan), dim=-1)
    got = op(padded_p, padded_q, tokens, lengths, vocab_size=40)
    tolerances.assert_same_sums(op.backend, [got], [expected])


def test_tokens_without_mass_or_outside_the_vocabulary(op):
    flat = torch.zeros(4, 1, 3)
    missing = flat.clone()
    missing[..., 1] = -torch.inf
    tokens = torch.tensor([[1], [1], [3], [-1]])
    ones = torch.ones(4, dtype=torch.int64)
    got = op(missing, flat, tokens, ones)
    assert got[0] == -torch.inf
    assert got[2:].isnan().all()
    assert op(flat, missing, tokens, ones)[0] == torch.inf
    assert op(missing, missing, tokens, ones)[:2].isnan().all()


def test_nan_counts_as_minus_infinity(op, generator):
    logits_p, logits_q, tokens, _ = problem(generator, 2, 3, 20)
    tokens = tokens % 10
    lengths = torch.tensor([3, 3])
    clean = logits_p.clone()
    logits_p[..., 15:], clean[..., 15:] = torch.nan, -torch.inf
    close(op(logits_p, logits_q, tokens, lengths), exact(clean, logits_q, tokens, lengths))


def test_a_row_does_not_depend_on_the_other_rows(op, generator):
    inputs = problem(generator, 7, 4, 3000)
    whole = op(*inputs)
    for rows in (slice(3, 4), slice(1, 6)):
        assert torch.equal(op(*(value[rows] for value in inputs)), whole[rows])


def test_a_length_beyond_the_ends_counts_as_the_nearer_end(op, generator):
    *inputs, _ = problem(generator, 4, 3, 40)
    for lengths in (torch.tensor([3, 4, 2**40, -1]), torch.tensor([2, 3, 2**31 - 1, -(2**31)])):
        expected = op(*inputs, lengths.clamp(0, 3))
        assert torch.equal(op(*inputs, lengths), expected)
        assert expected[3] == 0
        if lengths.abs().max() <= 2**31:
            assert torch.equal(op(*inputs, lengths.int()), expected)


def test_strided_views_int32_and_nothing(op, generator):
    inputs = problem(generator, 6, 8, 90)
    views = (inputs[0][::2, 1:5, :60], inputs[1][::2, 1:5, :60], inputs[2][::2, 1:5] % 60)
    lengths = torch.tensor([4, 2, 0], dtype=torch.int32)
    close(op(*views[:2], views[2].int(), lengths), exact(*views, lengths))
    empty = op(*(value[:0] for value in inputs))
    assert empty.shape == (0,)
    no_tokens = op(*(value[:, :0] for value in inputs[:3]), torch.zeros(6, dtype=torch.int64))
    assert no_tokens.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits_p": torch.zeros(3, 5)}, "logits_p .* 3 axes"),
        ({"logits_p": torch.zeros(2, 3, 5, dtype=torch.int64)}, "logits_p is torch.int64"),
        ({"logits_q": torch.zeros(2, 3, 6)}, r"logits_q .*\[2, 3, 6\].*= \[2, 3, 5\]"),
        ({"logits_q": torch.zeros(2, 3, 4), "vocab_size": 5}, "vocab_size is 5, expected 1 to 4"),
        ({"vocab_size": 6}, "vocab_size is 6, expected 1 to 5, the last axis of logits_p"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, r"tokens .*\[2, 4\].*= \[2, 3\]"),
        ({"tokens": torch.zeros(2, 3)}, "tokens is torch.float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths .*\[3\].*= \[2\]"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"logits_q": torch.zeros(2, 3, 5, requires_grad=True)}, "logits_q requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    arguments = {
        "logits_p": torch.zeros(2, 3, 5),
        "logits_q": torch.zeros(2, 3, 5),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int64),
    } | changes
    rejects(f"trajectory_log_ratio: {words}", lambda: trajectory_log_ratio(**arguments))


def test_compiles_as_one_graph(op, generator):
    compiled = torch.compile(
        lambda *inputs: op(*inputs), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 4):
        inputs = problem(generator, rows, 3, 60)
        torch.testing.assert_close(compiled(*inputs), op(*inputs))
