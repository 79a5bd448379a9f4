"""sample_tokens: its choice, the densities that it reports, truncation, keys, and bad rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import philox, sample_tokens

OP = "sample_tokens"
SIZES = [1, 2, 31, 1000, 1024, 4097, 32000, 50257, 128256, 151936]


def draw(op, logits: Tensor, num: int, **parameters):
    """`num` draws from one row of logits, keys 0 .. num-1."""
    return op(logits.expand(num, -1), torch.arange(num), 0, **parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_choice_is_the_inverse_cdf_in_token_order(op, generator, size, dtype):
    rows = 6
    logits = (torch.randn(rows, size, generator=generator) * 3).to(dtype)
    keys = torch.arange(rows) * 7919 - 3
    ids, logprobs, proposal, valid = op(logits, keys, 5, temperature=1.5, seed=-8)
    uniform = philox.uniform(-8, philox.ROLLOUT, keys, 5)
    running = (logits.double() / 1.5).softmax(dim=-1).cumsum(dim=-1)
    # fp32 exponentials move the boundaries by a few eps32 of the mass below them.
    slack = 2e-6
    chosen = ids.unsqueeze(-1)
    above = running.gather(-1, chosen).squeeze(-1)
    below = torch.where(
        ids > 0, running.gather(-1, (chosen - 1).clamp(min=0)).squeeze(-1), torch.zeros(())
    )
    assert valid.all()
    assert (above > uniform - slack).all()
    assert (below <= uniform + slack).all()
    raw = logits.double().log_softmax(-1).gather(-1, chosen).squeeze(-1)
    heated = (logits.double() / 1.5).log_softmax(-1).gather(-1, chosen).squeeze(-1)
    for got, expected in ((logprobs, raw), (proposal, heated)):
        assert got.dtype == torch.float32
        assert (got <= 0).all()
        torch.testing.assert_close(
            got.double(), expected, rtol=tolerances.LOGPROB_REL, atol=tolerances.LOGPROB_ABS
        )


def test_every_backend_draws_what_the_reference_draws(op, generator):
    logits = torch.randn(500, 1000, generator=generator) * 2
    keys = torch.arange(500)
    for parameters in ({}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9}, {"temperature": 0.0}):
        got = op(logits, keys, 2, seed=4, **parameters)
        expected = op.reference(logits, keys, 2, seed=4, **parameters)
        # A uniform within rounding of a boundary may fall on its other side: at most one in 500.
        assert (got.ids != expected.ids).sum() <= 1
        same = got.ids == expected.ids
        for a, b in zip(got[1:3], expected[1:3], strict=True):
            torch.testing.assert_close(a[same], b[same], rtol=2e-6, atol=tolerances.LOGPROB_ABS)


def test_minus_infinity_and_nan_are_never_drawn(op, generator):
    logits = torch.randn(40, generator=generator)
    logits[::3] = -torch.inf
    logits[1::3] = torch.nan
    for parameters in ({}, {"top_k": 20}, {"top_p": 0.99}, {"temperature": 50.0}):
        ids, logprobs, proposal, valid = draw(op, logits, 3000, **parameters)
        assert valid.all()
        assert (ids % 3 == 2).all()
        assert logprobs.isfinite().all()
        assert proposal.isfinite().all()


def test_padding_is_never_drawn_and_changes_nothing(op, generator):
    logits = torch.randn(200, 300, generator=generator)
    padded = logits.clone()
    padded[:, 256:] = 1e30
    padded[::2, 280:] = torch.nan
    for parameters in ({}, {"top_k": 10, "top_p": 0.5}, {"temperature": 0.0}):
        got = op(padded, torch.arange(200), 1, vocab_size=256, **parameters)
        expected = op(logits[:, :256], torch.arange(200), 1, **parameters)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_a_row_without_a_valid_logit_is_marked_and_leaves_the_others_alone(op, generator, bad):
    logits = torch.randn(5, 90, generator=generator)
    keys = torch.arange(5)
    for parameters in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}):
        expected = op(logits, keys, 0, **parameters)
        broken = logits.clone()
        broken[2] = bad
        got = op(broken, keys, 0, **parameters)
        assert got.valid.tolist() == [True, True, False, True, True]
        assert got.ids[2] == 0
        assert got.logprobs[2] == got.proposal_logprobs[2] == -torch.inf
        rest = [0, 1, 3, 4]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[rest], b[rest])


def test_an_infinite_logit_makes_its_row_invalid(op):
    logits = torch.zeros(2, 30)
    logits[1, 4] = torch.inf
    assert op(logits, torch.arange(2), 0).valid.tolist() == [True, False]
    assert op(logits, torch.arange(2), 0, temperature=0.0).valid.tolist() == [True, False]


def test_temperature_0_is_arg_max_with_the_lowest_id_on_ties(op, generator):
    logits = torch.randn(50, 400, generator=generator).round(decimals=1)
    logits[7] = 2.0
    got = op(logits, torch.arange(50), 3, temperature=0.0)
    best = logits.max(dim=-1, keepdim=True).values
    lowest = torch.where(logits == best, torch.arange(400), 400).amin(dim=-1)
    assert torch.equal(got.ids, lowest)
    assert (got.proposal_logprobs == 0).all()
    expected = logits.double().log_softmax(-1).gather(-1, lowest[:, None]).squeeze(-1)
    torch.testing.assert_close(got.logprobs.double(), expected, rtol=0, atol=tolerances.LOGPROB_ABS)


def test_a_temperature_that_is_0_in_fp32_is_arg_max_too(op, generator):
    logits = torch.randn(50, 400, generator=generator)
    expected = op(logits, torch.arange(50), 3, temperature=0.0)
    for cold in (1e-300, torch.full((50,), 1e-300, dtype=torch.float64)):
        for a, b in zip(op(logits, torch.arange(50), 3, temperature=cold), expected, strict=True):
            assert torch.equal(a, b)


def test_top_k_1_is_arg_max(op, generator):
    logits = torch.randn(50, 400, generator=generator).round(decimals=1)
    got = op(logits, torch.arange(50), 3, top_k=1)
    assert torch.equal(got.ids, op(logits, torch.arange(50), 3, temperature=0.0).ids)
    torch.testing.assert_close(got.proposal_logprobs, torch.zeros(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "parameters", "kept"),
    [
        # Exactly k are kept: ties at the edge go to the lower ids.
        ([1.0, 1.0, 1.0, 1.0], {"top_k": 2}, {0, 1}),
        ([0.0, 1.0, 0.0, 1.0], {"top_k": 3}, {0, 1, 3}),
        ([0.0, 1.0], {"top_k": 9}, {0, 1}),
        # The smallest set that reaches the mass; equal tokens by id.
        ([1.0, 1.0, 1.0, 1.0], {"top_p": 0.5}, {0, 1}),
        ([1.0, 1.0, 1.0, 1.0], {"top_p": 0.51}, {0, 1, 2}),
        ([0.0, math.log(7), math.log(2)], {"top_p": 0.69}, {1}),
        ([0.0, math.log(7), math.log(2)], {"top_p": 0.71}, {1, 2}),
        # At least one token, whatever the mass asked for.
        ([0.0, 1.0, 0.5], {"top_p": 0.0}, {1}),
        # top_k comes first: of the two that it leaves, {0.7, 0.2} / 0.9, one reaches 0.75.
        ([0.0, math.log(7), math.log(2)], {"top_k": 2, "top_p": 0.75}, {1}),
        ([0.0, math.log(7), math.log(2)], {"top_p": 0.75}, {1, 2}),
        # Temperature comes before both: it flattens, and two are needed.
        ([0.0, math.log(7), math.log(2)], {"temperature": 4.0, "top_p": 0.5}, {1, 2}),
    ],
)
def test_truncation_keeps_exactly_these(op, logits, parameters, kept):
    ids, _, proposal, _ = draw(op, torch.tensor(logits), 400, **parameters)
    assert set(ids.tolist()) == kept
    values = torch.tensor(logits).double() / parameters.get("temperature", 1.0)
    mass = values[sorted(kept)].logsumexp(0)
    torch.testing.assert_close(proposal.double(), values[ids] - mass, rtol=0, atol=1e-6)


def test_parameters_may_differ_by_row(op, generator):
    logits = torch.randn(1, 120, generator=generator).expand(6, -1)
    keys = torch.tensor([5, 5, 5, 5, 5, 6])
    heats, ks, ps = (
        [1.0, 0.0, 0.5, 2.0, 1.0, 1.0],
        [0, 4, 5, 0, 120, 1],
        [1.0, 0.2, 1.0, 0.6, 0.9, 1.0],
    )
    for dtype in (torch.int64, torch.int32):
        got = op(
            logits,
            keys,
            9,
            temperature=torch.tensor(heats),
            top_k=torch.tensor(ks, dtype=dtype),
            top_p=torch.tensor(ps),
            seed=21,
        )
        for row in range(6):
            one = op(
                logits[:1],
                keys[row : row + 1],
                9,
                temperature=heats[row],
                top_k=ks[row],
                top_p=ps[row],
                seed=21,
            )
            assert got.ids[row] == one.ids[0]
            for a, b in zip(got[1:3], one[1:3], strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-6, atol=2e-6)


def test_a_draw_depends_on_its_key_step_and_seed_and_on_nothing_else(op, generator):
    logits = torch.randn(64, 500, generator=generator)
    keys = torch.randint(-(2**62), 2**62, (64,), generator=generator)
    whole = op(logits, keys, 7, seed=3)
    order = torch.randperm(64, generator=generator)
    for rows in (order, order[:9], slice(5, 6)):
        part = op(logits[rows], keys[rows], 7, seed=3)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[rows], b)
    for other in ({"step": 8}, {"seed": 4}, {"keys": keys + 1}, {"keys": keys + 2**32}):
        changed = op(
            logits, other.get("keys", keys), other.get("step", 7), seed=other.get("seed", 3)
        )
        assert (changed.ids != whole.ids).sum() > 30


def test_seed_and_step_may_be_tensors(op, generator):
    logits = torch.randn(20, 50, generator=generator)
    keys = torch.arange(20)
    expected = op(logits, keys, 6, seed=-5)
    for step, seed in (
        (torch.tensor(6), torch.tensor(-5)),
        (torch.tensor([6]), torch.tensor([-5])),
    ):
        assert torch.equal(op(logits, keys, step, seed=seed).ids, expected.ids)


def test_strided_logits_and_int32_keys(op, generator):
    whole = torch.randn(20, 900, generator=generator)
    view = whole[::2, 5:805]
    got = op(view, torch.arange(10, dtype=torch.int32), 0)
    expected = op(view.contiguous(), torch.arange(10), 0)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_huge_magnitudes(op):
    logits = torch.tensor([[1e37, 1e37, -1e37], [-3e38, 3e38, 0.0]])
    ids, logprobs, proposal, valid = op(logits, torch.arange(2), 0)
    assert valid.all()
    assert ids[0] in (0, 1)
    assert ids[1] == 1
    expected = torch.tensor([-math.log(2), 0.0])
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(proposal, expected)


def test_no_rows(op):
    ids, logprobs, proposal, valid = op(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64), 0)
    assert ids.shape == logprobs.shape == proposal.shape == valid.shape == (0,)
    assert (ids.dtype, valid.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(5)}, r"sample_tokens: logits .*\[5\].* 2 axes"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int32)}, "logits is torch.int32"),
        ({"keys": torch.arange(4)}, r"keys .*\[4\].*= \[3\]"),
        ({"keys": torch.zeros(3)}, "keys is torch.float32"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": torch.ones(2)}, r"temperature .*\[2\].*= \[3\]"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"vocab_size": 9}, "vocab_size is 9, expected 1 to 5"),
        ({"logits": torch.zeros(3, 5, requires_grad=True)}, "logits requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    arguments = {"logits": torch.zeros(3, 5), "keys": torch.arange(3), "step": 0} | changes
    rejects(words, lambda: sample_tokens(**arguments))


def test_compiles_as_one_graph_with_the_randomness_as_an_input(op, generator):
    def run(logits, keys, step, seed):
        return op(logits, keys, step, seed=seed, top_k=5, top_p=0.9, temperature=0.8)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        arguments = (
            torch.randn(rows, 90, generator=generator),
            torch.arange(rows),
            torch.tensor(rows),
            torch.tensor(1),
        )
        for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
            torch.testing.assert_close(a, b)
