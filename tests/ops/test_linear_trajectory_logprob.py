"""linear_trajectory_logprob against float64 logits that are made whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import linear_trajectory_logprob

OP = "linear_trajectory_logprob"


def exact(hidden, weight, tokens, lengths, *, bias=None, scale=1.0, softcap=None) -> Tensor:
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    within = torch.arange(tokens.shape[1]) < lengths[:, None]
    ids = torch.where(within, tokens, 0).unsqueeze(-1)
    terms = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
    return torch.where(within, terms, 0).sum(-1)


def problem(generator, rows: int, length: int, width: int, size: int, dtype=torch.float32):
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype)
    # Logits with a standard deviation of about 3, as language models have them.
    weight = (torch.randn(size, width, generator=generator) * (3 / width**0.5)).to(dtype)
    tokens = torch.randint(0, size, (rows, length), generator=generator)
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    lengths[0] = length
    return hidden, weight, tokens, lengths


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    assert (got <= 0).all()
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerances.LINEAR_REL, atol=tolerances.LINEAR_ABS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "size"),
    [
        *((8, 1), (16, 2), (64, 31), (33, 1000), (24, 1024), (16, 4097)),
        *((128, 8192), (96, 8193), (16, 32000), (64, 50257), (8, 128256), (8, 151936)),
    ],
)
def test_matches_float64_at_every_size_and_dtype(op, generator, width, size, dtype):
    inputs = problem(generator, 3, 5, width, size, dtype)
    close(op(*inputs), exact(*inputs))


@pytest.mark.parametrize(
    "parameters",
    [{"scale": 0.25}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0}],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_bias_then_scale_then_soft_cap(op, generator, biased, parameters):
    inputs = problem(generator, 3, 4, 32, 700)
    bias = torch.randn(700, generator=generator) if biased else None
    close(op(*inputs, bias=bias, **parameters), exact(*inputs, bias=bias, **parameters))


def test_128_tokens_of_bf16_states_lose_nothing_more(op, generator):
    hidden, weight, tokens, _ = problem(generator, 2, 128, 256, 3000, torch.bfloat16)
    inputs = (hidden, weight, tokens, torch.tensor([128, 90]))
    close(op(*inputs), exact(*inputs))


def test_what_lies_beyond_a_length_is_not_looked_at(op, generator):
    hidden, weight, tokens, _ = problem(generator, 3, 5, 16, 90)
    lengths = torch.tensor([0, 2, 5])
    expected = op(hidden, weight, tokens, lengths)
    beyond = torch.arange(5) >= lengths[:, None]
    hidden[beyond] = torch.nan
    tokens[beyond] = torch.tensor([-100, 10**9, 90, -1, 2**40, 41, 99, -5])
    got = op(hidden, weight, tokens, lengths)
    assert torch.equal(got, expected)
    assert got[0] == 0


def test_padding_of_the_vocabulary_never_enters(op, generator):
    hidden, weight, tokens, lengths = problem(generator, 3, 5, 16, 90)
    bias = torch.zeros(100)
    bias[90:] = 1e30
    padded = torch.cat((weight, torch.full((10, 16), torch.nan)))
    got = op(hidden, padded, tokens, lengths, bias=bias, vocab_size=90)
    close(got, exact(hidden, weight, tokens, lengths))


def test_a_token_outside_the_vocabulary_or_a_state_of_nan_is_loud(op, generator):
    hidden, weight, tokens, _ = problem(generator, 4, 3, 16, 90)
    lengths = torch.full((4,), 3)
    tokens[0, 1], tokens[1, 2], tokens[2, 0] = 90, -1, 2**33
    hidden[3, 1] = torch.nan
    assert op(hidden, weight, tokens, lengths).isnan().all()


def test_a_token_without_mass_gives_minus_infinity(op, generator):
    hidden, weight, tokens, lengths = problem(generator, 2, 3, 16, 90)
    bias = torch.zeros(90)
    bias[tokens[0, 1]] = -torch.inf
    assert op(hidden, weight, tokens, lengths, bias=bias)[0] == -torch.inf


def test_a_row_does_not_depend_on_the_rows_beside_it(op, generator):
    hidden, weight, tokens, lengths = problem(generator, 6, 4, 64, 9000)
    whole = op(hidden, weight, tokens, lengths)
    hidden[[0, 5]] = 7.0
    tokens[[0, 5]] = 1
    again = op(hidden, weight, tokens, lengths)
    assert torch.equal(again[1:5], whole[1:5])


def test_a_length_beyond_the_ends_counts_as_the_nearer_end(op, generator):
    *inputs, _ = problem(generator, 4, 3, 16, 40)
    for lengths in (torch.tensor([3, 4, 2**40, -1]), torch.tensor([2, 3, 2**31 - 1, -(2**31)])):
        expected = op(*inputs, lengths.clamp(0, 3))
        assert torch.equal(op(*inputs, lengths), expected)
        assert expected[3] == 0
        if lengths.abs().max() <= 2**31:
            assert torch.equal(op(*inputs, lengths.int()), expected)


def test_strided_views_int32_and_nothing(op, generator):
    hidden, weight, tokens, _ = problem(generator, 6, 8, 32, 90)
    views = (hidden[::2, 1:5], weight[::2], tokens[::2, 1:5] % 45)
    lengths = torch.tensor([4, 2, 0], dtype=torch.int32)
    close(op(*views[:2], views[2].int(), lengths), exact(*views, lengths))
    none = torch.zeros(0, dtype=torch.int64)
    assert op(hidden[:0], weight, tokens[:0], none).shape == (0,)
    no_tokens = op(hidden[:, :0], weight, tokens[:, :0], torch.zeros(6, dtype=torch.int64))
    assert no_tokens.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(2, 4)}, "hidden .* 3 axes"),
        ({"weight": torch.zeros(5, 3)}, r"weight .*\[5, 3\].*= \[5, 4\]"),
        ({"weight": torch.zeros(5, 4).half()}, "weight is torch.float16, expected torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias .*\[4\].*= \[5\]"),
        ({"vocab_size": 6}, "vocab_size is 6, expected 1 to 5"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a number above 0"),
        ({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, r"tokens .*\[2, 2\].*= \[2, 3\]"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, r"lengths .*\[1\].*= \[2\]"),
        ({"weight": torch.zeros(5, 4, requires_grad=True)}, "weight requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int64),
    } | changes
    rejects(f"linear_trajectory_logprob: {words}", lambda: linear_trajectory_logprob(**arguments))


def test_compiles_as_one_graph(op, generator):
    compiled = torch.compile(
        lambda *inputs: op(*inputs), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 4):
        inputs = problem(generator, rows, 3, 16, 60)
        torch.testing.assert_close(compiled(*inputs), op(*inputs))
