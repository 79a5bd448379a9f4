"""value_sample_tokens: its choice, densities and divergence, truncation, padding, and bad rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import philox, sample_tokens, value_sample_tokens

OP = "value_sample_tokens"
SIZES = [1, 2, 31, 1000, 1024, 4097, 32000, 128256]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "alpha": 1.7},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_p": 0.8},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.7, "alpha": 0.5},
]


class Inputs(NamedTuple):
    """The tensors of a call but the keys."""

    logits: Tensor
    directions: Tensor
    token_embeddings: Tensor


def make(
    generator: torch.Generator,
    rows: int,
    size: int,
    rank: int = 16,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
) -> Inputs:
    shapes = ((rows, size), (rows, rank), (size, rank))
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    scales = (2.0, 1.0, 1.5 / max(rank, 1) ** 0.5)
    return Inputs(*((x * y).to(z) for x, y, z in zip(drawn, scales, dtypes, strict=True)))


def exact_laws(
    inputs: Inputs,
    alpha: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs `[N, V]` of the prior and of the law that is drawn from, in float64."""
    logits, directions, embeddings = (x.double() for x in inputs)
    guided = (logits + directions @ embeddings.T / alpha) / temperature
    order = guided.sort(dim=-1, descending=True, stable=True).indices
    masses = guided.softmax(-1).gather(-1, order)
    if top_k:
        masses[:, top_k:] = 0
    masses /= masses.sum(-1, keepdim=True)
    if top_p < 1:
        before = masses.cumsum(-1) - masses
        masses[:, 1:] = torch.where(before >= top_p - 1e-12, 0.0, masses)[:, 1:]
    masses /= masses.sum(-1, keepdim=True)
    law = torch.zeros_like(masses).scatter(-1, order, masses).log()
    return logits.log_softmax(-1), law


def divergence(law: Tensor, prior: Tensor) -> Tensor:
    return torch.where(law == -torch.inf, 0.0, law.exp() * (law - prior)).sum(-1)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerances.LOGPROB_REL, atol=tolerances.LOGPROB_ABS
    )


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtypes", [(FP32,) * 3, (BF16,) * 3, (FP16,) * 3, (FP16, FP32, BF16)])
@pytest.mark.parametrize("size", SIZES)
def test_the_choice_is_the_inverse_cdf_of_the_reweighted_law(op, generator, size, dtypes):
    rows = 5
    inputs = make(generator, rows, size, dtypes=dtypes)
    keys = torch.arange(rows) * 7919 - 3
    got = op(*inputs, keys, 5, alpha=0.8, temperature=1.5, seed=-8)
    prior, law = exact_laws(inputs, 0.8, 1.5)
    uniform = philox.uniform(-8, philox.ROLLOUT, keys, 5)
    running = law.exp().cumsum(-1)
    # fp32 exponentials and products move the boundaries by a few eps32 of the mass below them.
    slack = 4e-6
    chosen = got.ids.unsqueeze(-1)
    above = running.gather(-1, chosen).squeeze(-1)
    below = torch.where(
        got.ids > 0, running.gather(-1, (chosen - 1).clamp(min=0)).squeeze(-1), torch.zeros(())
    )
    assert got.valid.all() and got.ids.dtype == torch.int64
    assert (above > uniform - slack).all()
    assert (below <= uniform + slack).all()
    close(got.prior_logprobs, prior.gather(-1, chosen).squeeze(-1))
    close(got.guided_logprobs, law.gather(-1, chosen).squeeze(-1))
    close(got.kl, divergence(law, prior))
    assert (got.prior_logprobs <= 0).all() and (got.guided_logprobs <= 0).all()
    assert (got.kl >= 0).all()


@pytest.mark.parametrize("rank", [0, 1, 3, 17, 64, 200])
def test_any_number_of_columns(op, generator, rank):
    inputs = make(generator, 20, 300, rank)
    got = op(*inputs, torch.arange(20), 1)
    expected = op.reference(*inputs, torch.arange(20), 1)
    agree = got.ids == expected.ids
    assert agree.sum() >= 19
    for a, b in zip(got[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(a[agree], b[agree], rtol=1e-5, atol=tolerances.LOGPROB_ABS)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("parameters", [*CUTS, {"greedy": True}, {"temperature": 0.0}], ids=str)
def test_every_backend_draws_what_the_reference_draws(op, generator, parameters, rows):
    inputs = make(generator, rows, 1500)
    keys = torch.arange(rows)
    got = op.or_auto(*inputs, keys, 2, seed=4, **parameters)
    expected = op.reference(*inputs, keys, 2, seed=4, **parameters)
    # A uniform within rounding of a boundary may fall on its other side.
    agree = got.ids == expected.ids
    assert (~agree).sum() <= 1
    for a, b in zip(got[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(a[agree], b[agree], rtol=2e-6, atol=tolerances.LOGPROB_ABS)


@pytest.mark.parametrize("parameters", CUTS, ids=str)
def test_the_divergence_is_that_of_the_law_from_the_prior(op, generator, parameters):
    inputs = make(generator, 12, 700)
    got = op.or_auto(*inputs, torch.arange(12), 3, **parameters)
    prior, law = exact_laws(inputs, **parameters)
    close(got.kl, divergence(law, prior))
    chosen = got.ids.unsqueeze(-1)
    close(got.guided_logprobs, law.gather(-1, chosen).squeeze(-1))
    if parameters == {}:
        # At temperature 1 without a cut: E[q] - lse(x + q) + lse(x).
        logits, directions, embeddings = (x.double() for x in inputs)
        q = directions @ embeddings.T
        terms = (law.exp() * q).sum(-1) - (logits + q).logsumexp(-1) + logits.logsumexp(-1)
        close(got.kl, terms)


@pytest.mark.parametrize("heat", [1.0, 0.6])
def test_a_value_that_all_tokens_share_changes_nothing(op, generator, heat):
    """Only differences of the values count, and the divergence keeps its digits."""
    logits, directions, embeddings = make(generator, 30, 600, 8)
    keys = torch.arange(30)
    plain = op(logits, directions, embeddings, keys, 0, temperature=heat)
    shared = torch.full((30, 1), 40.0)
    raised = op(
        logits,
        torch.cat((directions, shared), -1),
        torch.cat((embeddings, torch.ones(600, 1)), -1),
        keys,
        0,
        temperature=heat,
    )
    assert (plain.ids == raised.ids).sum() >= 29
    torch.testing.assert_close(raised.kl, plain.kl, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [300, 4097])
def test_directions_of_0_draw_what_sample_tokens_draws(op, generator, size, dtype):
    # The interpreter of Triton takes milliseconds a row.
    rows = 40 if op.backend == "triton" else 400
    logits, directions, embeddings = make(generator, rows, size, dtypes=(dtype, dtype, dtype))
    keys = torch.arange(rows) * 31 - 5
    backend = "ref" if op.backend == "ref" else None
    for parameters in ({}, {"temperature": 0.7}, {"top_k": 30, "top_p": 0.9}):
        got = op.or_auto(logits, directions * 0, embeddings, keys, 9, seed=6, **parameters)
        expected = sample_tokens(logits, keys, 9, seed=6, backend=backend, **parameters)
        if op.backend == "ref":
            assert torch.equal(got.ids, expected.ids)
        # Kernels add up other blocks: a uniform within rounding of a boundary may cross it.
        agree = got.ids == expected.ids
        assert (~agree).sum() <= 1
        for a, b in (
            (got.prior_logprobs, expected.logprobs),
            (got.guided_logprobs, expected.proposal_logprobs),
        ):
            torch.testing.assert_close(a[agree], b[agree], rtol=2e-6, atol=tolerances.LOGPROB_ABS)
        if not parameters:
            assert got.kl.max() < 1e-6


@pytest.mark.parametrize("parameters", [{"greedy": True}, {"temperature": 0.0}], ids=str)
def test_an_arg_max_has_the_lowest_id_on_ties(op, generator, parameters):
    logits, directions, embeddings = make(generator, 50, 700)
    # Tokens that repeat, far apart: equal logits and equal embeddings, so that all values tie.
    logits[:, 350:] = logits[:, :350]
    embeddings[350:] = embeddings[:350]
    got = op(logits, directions, embeddings, torch.arange(50), 3, **parameters)
    guided = logits.double() + directions.double() @ embeddings.double().T
    assert (got.ids < 350).all()
    best = guided.amax(-1)
    torch.testing.assert_close(guided.gather(-1, got.ids[:, None])[:, 0], best, rtol=0, atol=1e-5)
    assert (got.guided_logprobs == 0).all()
    close(got.prior_logprobs, logits.double().log_softmax(-1).gather(-1, got.ids[:, None])[:, 0])
    assert torch.equal(got.kl, -got.prior_logprobs)
    tied = op(
        torch.zeros(4, 300),
        torch.zeros(4, 3),
        embeddings[:300, :3],
        torch.arange(4),
        0,
        greedy=True,
    )
    assert (tied.ids == 0).all()


def test_top_k_1_is_the_arg_max(op, generator):
    inputs = make(generator, 50, 400)
    got = op.or_auto(*inputs, torch.arange(50), 3, top_k=1)
    best = op.or_auto(*inputs, torch.arange(50), 3, greedy=True)
    assert torch.equal(got.ids, best.ids)
    torch.testing.assert_close(got.kl, best.kl, rtol=1e-5, atol=1e-5)


def test_minus_infinity_and_nan_are_never_drawn(op, generator):
    logits, directions, embeddings = make(generator, 1, 600, 4)
    logits[:, ::3] = -torch.inf
    logits[:, 1::3] = torch.nan
    # The value of a token that cannot be drawn means nothing, whatever it is.
    embeddings[::3] = 1e6
    embeddings[1::6] = torch.nan
    embeddings[4::6] = torch.inf
    num = 50 if op.backend == "triton" else 2000
    rows = (logits.expand(num, -1), directions.expand(num, -1))
    for parameters in (*CUTS, {"temperature": 50.0}):
        got = op.or_auto(*rows, embeddings, torch.arange(num), 0, **parameters)
        assert got.valid.all()
        assert (got.ids % 3 == 2).all()
        for values in got[1:4]:
            assert values.isfinite().all()


def test_padding_is_never_drawn_and_changes_nothing(op, generator):
    logits, directions, embeddings = make(generator, 60, 300)
    padded = logits.clone()
    padded[:, 256:] = 1e30
    padded[::2, 280:] = torch.nan
    spoiled = torch.cat((embeddings, embeddings))
    spoiled[256:] = torch.nan
    keys = torch.arange(60)
    for parameters in (*CUTS, {"greedy": True}):
        expected = op.or_auto(logits[:, :256], directions, embeddings[:256], keys, 1, **parameters)
        got = op.or_auto(padded, directions, spoiled, keys, 1, vocab_size=256, **parameters)
        tolerances.assert_same_sums(op.backend, got, expected)


def bad_rows(inputs: Inputs) -> dict[str, tuple[Inputs, float]]:
    """Calls whose row 2 has no law, by what is wrong with it, and its alpha."""
    found = {}
    for name, bad in (("-inf", -torch.inf), ("nan", torch.nan)):
        logits = inputs.logits.clone()
        logits[2] = bad
        found[f"logits of {name}"] = (inputs._replace(logits=logits), 1.0)
    logits = inputs.logits.clone()
    logits[2, 40] = torch.inf
    found["a logit of +inf"] = (inputs._replace(logits=logits), 1.0)
    for name, bad in (("nan", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf)):
        directions = inputs.directions.clone()
        directions[2, 1] = bad
        found[f"a direction of {name}"] = (inputs._replace(directions=directions), 1.0)
    directions = inputs.directions.clone()
    directions[2] *= 1e30
    found["values beyond fp32"] = (inputs._replace(directions=directions), 1e-12)
    return found


@pytest.mark.parametrize("parameters", [*CUTS[:1], *CUTS[3:], {"greedy": True}], ids=str)
def test_a_row_without_a_law_is_marked_and_leaves_the_others_alone(op, generator, parameters):
    inputs = make(generator, 5, 90)
    keys = torch.arange(5)
    rest = [0, 1, 3, 4]
    for name, (broken, alpha) in bad_rows(inputs).items():
        alphas = torch.ones(5)
        alphas[2] = alpha
        given = {**parameters, "alpha": alphas}
        expected = op.or_auto(*inputs, keys, 0, **given)
        got = op.or_auto(*broken, keys, 0, **given)
        assert got.valid.tolist() == [True, True, False, True, True], name
        assert got.ids[2] == 0 and got.kl[2] == 0, name
        assert got.prior_logprobs[2] == got.guided_logprobs[2] == -torch.inf, name
        same([x[rest] for x in got], [x[rest] for x in expected])


def test_one_value_that_is_not_finite_makes_every_row_invalid_that_allows_its_token(op, generator):
    logits, directions, embeddings = make(generator, 6, 700)
    embeddings[650, 3] = torch.inf
    logits[::2, 650] = -torch.inf
    for parameters in ({}, {"top_k": 5}, {"greedy": True}):
        got = op.or_auto(logits, directions, embeddings, torch.arange(6), 0, **parameters)
        assert got.valid.tolist() == [True, False] * 3


def test_parameters_may_differ_by_row(op, generator):
    inputs = make(generator, 6, 220)
    keys = torch.tensor([5, 5, 5, 5, 5, 6])
    rows = {
        "alpha": [1.0, 0.3, 2.0, 1.0, 1.0, 5.0],
        "temperature": [1.0, 0.0, 0.5, 2.0, 1.0, 1.0],
        "top_k": [0, 4, 5, 0, 220, 1],
        "top_p": [1.0, 0.2, 1.0, 0.6, 0.9, 1.0],
    }
    names = list(rows)
    for chosen in (names, names[:2]):
        given = {name: torch.tensor(rows[name]) for name in chosen}
        got = op.or_auto(*inputs, keys, 9, seed=21, **given)
        for row in range(6):
            part = [x[row : row + 1] for x in inputs[:2]]
            numbers = {name: rows[name][row] for name in chosen}
            one = op.or_auto(
                *part, inputs.token_embeddings, keys[row : row + 1], 9, seed=21, **numbers
            )
            assert got.ids[row] == one.ids[0]
            for a, b in zip(got[1:4], one[1:4], strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("parameters", [CUTS[0], CUTS[5]], ids=str)
def test_a_draw_depends_on_its_key_step_and_seed_and_on_nothing_else(op, generator, parameters):
    logits, directions, embeddings = make(generator, 64, 600)
    keys = torch.randint(-(2**62), 2**62, (64,), generator=generator)
    whole = op.or_auto(logits, directions, embeddings, keys, 7, seed=3, **parameters)
    order = torch.randperm(64, generator=generator)
    for rows in (order, order[:9], order[:17], slice(5, 6)):
        part = op.or_auto(
            logits[rows], directions[rows], embeddings, keys[rows], 7, seed=3, **parameters
        )
        same(part, [x[rows] for x in whole])
    for other in ({"step": 8}, {"seed": 4}, {"keys": keys + 1}, {"keys": keys + 2**32}):
        changed = op.or_auto(
            logits,
            directions,
            embeddings,
            other.get("keys", keys),
            other.get("step", 7),
            seed=other.get("seed", 3),
            **parameters,
        )
        assert (changed.ids != whole.ids).sum() > 20


def test_seed_and_step_may_be_tensors(op, generator):
    inputs = make(generator, 20, 50)
    keys = torch.arange(20)
    expected = op(*inputs, keys, 6, seed=-5)
    for step, seed in (
        (torch.tensor(6), torch.tensor(-5)),
        (torch.tensor([6], dtype=torch.int32), torch.tensor([-5])),
    ):
        same(op(*inputs, keys, step, seed=seed), expected)


def test_strided_inputs_and_int32_keys(op, generator):
    logits = torch.randn(20, 900, generator=generator)[::2, 5:805]
    directions = torch.randn(20, 30, generator=generator)[::2, 3:27]
    embeddings = torch.randn(1700, 40, generator=generator)[::2, 6:30][:800]
    views = (logits, directions, embeddings)
    expected = op(*(x.contiguous() for x in views), torch.arange(10), 0)
    got = op(*views, torch.arange(10, dtype=torch.int32), 0)
    tolerances.assert_same_sums(op.backend, got, expected)
    turned = tuple(x.t().contiguous().t() for x in views)
    got = op(*turned, torch.arange(20)[::2] // 2, 0)
    assert torch.equal(got.ids, expected.ids)


def test_huge_magnitudes(op):
    logits = torch.tensor([[1e37, 1e37, -1e37], [-3e38, 3e38, 0.0]])
    got = op(logits, torch.zeros(2, 1), torch.ones(3, 1), torch.arange(2), 0)
    assert got.valid.all() and got.ids[0] in (0, 1) and got.ids[1] == 1
    expected = torch.tensor([-math.log(2), 0.0])
    torch.testing.assert_close(got.prior_logprobs, expected)
    torch.testing.assert_close(got.guided_logprobs, expected)
    assert (got.kl < 1e-6).all()
    # A value that decides alone: the law is one token, at whatever the prior gives it.
    got = op(
        torch.zeros(1, 3),
        torch.ones(1, 1),
        torch.tensor([[0.0], [1e30], [-1e30]]),
        torch.arange(1),
        0,
    )
    assert got.ids.tolist() == [1]
    torch.testing.assert_close(got.kl, torch.tensor([math.log(3)]))


def test_no_rows(op):
    got = op(torch.zeros(0, 12), torch.zeros(0, 4), torch.zeros(12, 4), torch.zeros(0).long(), 0)
    assert all(x.shape == (0,) for x in got)
    assert (got.ids.dtype, got.valid.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(5)}, r"value_sample_tokens: logits .*\[5\].* 2 axes"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int32)}, "logits is torch.int32"),
        ({"directions": torch.zeros(4, 2)}, r"directions .*\[4, 2\].*= \[3, 2\]"),
        ({"directions": torch.zeros(3)}, r"directions .*\[3\].* 2 axes"),
        ({"token_embeddings": torch.zeros(5, 3)}, r"token_embeddings .*\[5, 3\].*= \[5, 2\]"),
        ({"token_embeddings": torch.zeros(4, 2)}, r"token_embeddings .*\[4, 2\].* at least 5 rows"),
        ({"token_embeddings": torch.zeros(5, 2).long()}, "token_embeddings is torch.int64"),
        ({"keys": torch.arange(4)}, r"keys .*\[4\].*= \[3\]"),
        ({"alpha": 0.0}, "alpha is 0.0, expected"),
        ({"alpha": -1.0}, "alpha is -1.0, expected"),
        ({"alpha": torch.ones(2)}, r"alpha .*\[2\].*= \[3\]"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"greedy": 1}, "greedy is 1, expected True or False"),
        ({"vocab_size": 9}, "vocab_size is 9, expected 1 to 5"),
        ({"directions": torch.zeros(3, 2, requires_grad=True)}, "directions requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    arguments = {
        "logits": torch.zeros(3, 5),
        "directions": torch.zeros(3, 2),
        "token_embeddings": torch.zeros(5, 2),
        "keys": torch.arange(3),
        "step": 0,
    }
    rejects(words, lambda: value_sample_tokens(**arguments | changes))


def test_embeddings_may_be_as_few_as_vocab_size(op, generator):
    logits, directions, embeddings = make(generator, 4, 30)
    got = op(logits, directions, embeddings[:20], torch.arange(4), 0, vocab_size=20)
    expected = op(logits[:, :20], directions, embeddings[:20], torch.arange(4), 0)
    tolerances.assert_same_sums(op.backend, got, expected)


def test_compiles_as_one_graph_with_the_randomness_as_an_input(op, generator):
    def run(logits, directions, embeddings, keys, step, seed):
        return op(
            logits, directions, embeddings, keys, step, seed=seed, top_k=5, top_p=0.9, alpha=0.8
        )

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        arguments = (
            *make(generator, rows, 90),
            torch.arange(rows),
            torch.tensor(rows),
            torch.tensor(1),
        )
        for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
            torch.testing.assert_close(a, b)
