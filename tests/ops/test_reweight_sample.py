"""reweight_sample against the formulas in float64, closed forms, and the law of its choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tests.ops.statistics import chi_square_excess
from tq_fast.ops import philox, reweight_sample

OP = "reweight_sample"
SHAPES = [(1, 1, 1), (1, 10, 1), (3, 10, 8), (2, 20, 8), (5, 3, 17), (2, 64, 4)]


def problem(generator, trees: int, k: int, n: int) -> dict[str, Tensor]:
    return {
        "prior_logprobs": torch.randn(trees, k, generator=generator).log_softmax(-1),
        "token_ids": torch.stack(
            [torch.randperm(50000, generator=generator)[:k] for _ in range(trees)]
        ),
        "rewards": torch.randn(trees, k, n, generator=generator) * 3,
        "log_weights": torch.randn(trees, k, n, generator=generator) * 2,
        "lengths": torch.randint(1, n + 1, (trees, k), generator=generator),
    }


def exact(problem: dict[str, Tensor], alpha: float, estimator: str) -> dict[str, Tensor]:
    """One candidate at a time, straight from the formulas, in float64."""
    trees, k, n = problem["rewards"].shape
    result = {name: torch.zeros(trees, k, dtype=torch.float64) for name in ("q", "q_stderr", "ess")}
    for g in range(trees):
        for z in range(k):
            length = n if problem.get("lengths") is None else problem["lengths"][g, z].item()
            r = problem["rewards"][g, z, :length].double()
            log_weights = problem.get("log_weights")
            lw = torch.zeros_like(r) if log_weights is None else log_weights[g, z, :length].double()
            w = lw.exp() / lw.exp().sum()
            if estimator == "mean":
                q = (w * r).sum()
                variance = (w**2 * (r - q) ** 2).sum()
            else:
                q = alpha * (w * (r / alpha).exp()).sum().log()
                variance = (alpha * w * ((r - q) / alpha).exp() - alpha * w).square().sum()
            result["q"][g, z] = q
            result["q_stderr"][g, z] = (
                (length / (length - 1) * variance).sqrt() if length > 1 else math.nan
            )
            result["ess"][g, z] = 1 / (w**2).sum()
    score = problem["prior_logprobs"].double() + result["q"] / alpha
    result["final_logprobs"] = score.log_softmax(-1)
    return result


@pytest.mark.parametrize("estimator", ["mean", "soft"])
@pytest.mark.parametrize("alpha", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("given", ["plain", "weighted", "ragged", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formulas(op, generator, shape, given, alpha, estimator):
    inputs = problem(generator, *shape)
    if given in ("plain", "ragged"):
        inputs["log_weights"] = None
    if given in ("plain", "weighted"):
        inputs["lengths"] = None
    expected = exact(inputs, alpha, estimator)
    if inputs["lengths"] is not None:
        beyond = torch.arange(shape[2]) >= inputs["lengths"].unsqueeze(-1)
        inputs["rewards"][beyond] = torch.nan
        if inputs["log_weights"] is not None:
            inputs["log_weights"][beyond] = torch.nan
    got = op(*inputs.values(), alpha=alpha, estimator=estimator, greedy=True)
    for name, value in expected.items():
        field = getattr(got, name)
        assert field.dtype == torch.float32
        # Scores as large as |r| / alpha lose digits in proportion before they are exponentiated.
        torch.testing.assert_close(
            field.double(),
            value,
            rtol=tolerances.REWEIGHT_REL,
            atol=tolerances.REWEIGHT_ABS,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (got.final_logprobs <= 0).all()
    assert got.choice.tolist() == expected["final_logprobs"].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_dtypes_and_int32_ids(op, generator, dtype):
    inputs = problem(generator, 2, 5, 4)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value.int()
        for name, value in inputs.items()
    }
    expected = exact(inputs, 0.7, "mean")
    got = op.or_auto(*inputs.values(), alpha=0.7)
    torch.testing.assert_close(got.q.double(), expected["q"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        got.final_logprobs.double(), expected["final_logprobs"], rtol=1e-6, atol=1e-6
    )


def test_one_roll_out_has_an_error_that_nobody_knows(op):
    got = op(torch.zeros(1, 2), torch.tensor([[1, 2]]), torch.ones(1, 2, 1), alpha=1.0)
    assert got.q_stderr.isnan().all()
    assert got.ess.tolist() == [[1.0, 1.0]]


def test_equal_rewards_give_back_the_prior_without_error(op, generator):
    prior = torch.randn(3, 6, generator=generator).log_softmax(-1)
    ids = torch.arange(18).view(3, 6)
    for estimator in ("mean", "soft"):
        got = op(prior, ids, torch.full((3, 6, 5), 2.5), alpha=0.3, estimator=estimator)
        torch.testing.assert_close(got.final_logprobs, prior, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.q, torch.full((3, 6), 2.5))
        torch.testing.assert_close(got.q_stderr, torch.zeros(3, 6), rtol=0, atol=1e-6)
        torch.testing.assert_close(got.ess, torch.full((3, 6), 5.0))


def test_weights_are_normalised_within_each_candidate(op, generator):
    inputs = problem(generator, 2, 4, 6)
    shifted = dict(inputs)
    # Any constant a candidate, even one that overflows exp, changes nothing.
    shifted["log_weights"] = (
        inputs["log_weights"] + torch.tensor([900.0, -900.0, 0.0, 40.0])[:, None]
    )
    got, expected = (op(*case.values(), alpha=1.0, greedy=True) for case in (shifted, inputs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_one_weight_takes_all(op):
    rewards = torch.tensor([[[1.0, 5.0, -2.0]]])
    weights = torch.tensor([[[-torch.inf, 3.0, -torch.inf]]])
    got = op(torch.zeros(1, 1), torch.tensor([[7]]), rewards, weights, alpha=1.0)
    assert (got.q.item(), got.q_stderr.item(), got.ess.item()) == (5.0, 0.0, 1.0)


def test_a_weight_of_zero_drops_even_a_nan_or_infinite_reward(op):
    rewards = torch.tensor([[[torch.nan, 5.0, torch.inf, -torch.inf]]])
    weights = torch.tensor([[[-torch.inf, 0.0, -torch.inf, -torch.inf]]])
    for estimator in ("mean", "soft"):
        got = op(
            torch.zeros(1, 1), torch.tensor([[7]]), rewards, weights, alpha=1.0, estimator=estimator
        )
        assert (got.q.item(), got.final_logprobs.item()) == (5.0, 0.0)


def test_the_soft_estimate_tends_to_the_mean_and_to_the_best(op, generator):
    rewards = torch.randn(1, 3, 8, generator=generator)
    arguments = (torch.zeros(1, 3), torch.tensor([[1, 2, 3]]), rewards)
    cold = op(*arguments, alpha=1e-3, estimator="soft", greedy=True).q
    torch.testing.assert_close(cold, rewards.amax(-1), rtol=0, atol=3e-3)
    warm = op(*arguments, alpha=1e4, estimator="soft", greedy=True).q
    torch.testing.assert_close(warm, rewards.mean(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("cause", ["nan reward", "no roll-out", "no weight", "no prior"])
def test_a_candidate_without_a_score_is_never_chosen(op, generator, cause, greedy):
    trees = 300
    inputs = problem(generator, trees, 3, 4)
    inputs["lengths"] = torch.full((trees, 3), 4)
    inputs["prior_logprobs"][:, 1] = 5.0
    if cause == "nan reward":
        inputs["rewards"][:, 1, 2] = torch.nan
    elif cause == "no roll-out":
        inputs["lengths"][:, 1] = 0
    elif cause == "no weight":
        inputs["log_weights"][:, 1] = -torch.inf
    else:
        inputs["prior_logprobs"][:, 1] = -torch.inf
    got = op(*inputs.values(), alpha=1.0, greedy=greedy)
    assert (got.choice != 1).all()
    assert (got.final_logprobs[:, 1] == -torch.inf).all()
    rest = got.final_logprobs[:, [0, 2]].exp().sum(-1)
    torch.testing.assert_close(rest, torch.ones(trees))


def test_without_any_scored_candidate_the_lowest_id_is_named_with_no_probability(op):
    got = op(
        torch.full((1, 3), -torch.inf), torch.tensor([[9, 4, 6]]), torch.zeros(1, 3, 2), alpha=1.0
    )
    assert got.choice.tolist() == [1]
    assert (got.final_logprobs == -torch.inf).all()


def test_a_length_beyond_the_ends_counts_as_the_nearer_end(op, generator):
    inputs = problem(generator, 2, 3, 4)
    inputs["lengths"] = torch.tensor([[4, 9, 2**62], [0, -1, -(2**62)]])
    within = inputs | {"lengths": inputs["lengths"].clamp(0, 4)}
    for a, b in zip(op(*inputs.values(), alpha=1.0), op(*within.values(), alpha=1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_score_never_gives_a_log_probability_above_0(op):
    prior = torch.tensor([[torch.inf, 0.0, 1.0], [0.0, 0.0, 1.0]])
    ids = torch.arange(6).view(2, 3)
    got = op(prior, ids, torch.zeros(2, 3, 2), alpha=1.0, greedy=True)
    assert got.choice.tolist() == [0, 2]
    assert not (got.final_logprobs > 0).any()
    assert not got.final_logprobs[0].isfinite().any()
    torch.testing.assert_close(got.final_logprobs[1], prior[1].log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_largest_id_of_all_is_an_id_like_any_other(op, dtype):
    most = torch.iinfo(dtype).max
    for ids, prior, choice in (
        ([3, most], [-2.0, -1.0], 1),
        ([most, 3], [-1.0, -1.0], 1),
        ([most, most], [-2.0, -1.0], 1),
    ):
        ids = torch.tensor([ids], dtype=dtype)
        got = op(torch.tensor([prior]), ids, torch.zeros(1, 2, 1), alpha=1.0, greedy=True)
        assert got.choice.tolist() == [choice]


def test_greedy_ties_go_to_the_lower_token_id(op):
    prior = torch.tensor([[0.0, 0.0, 0.0, -1.0]])
    for ids, choice in (([30, 7, 12, 1], 1), ([5, 7, 12, 1], 0), ([9, 8, 2, 1], 2)):
        got = op(prior, torch.tensor([ids]), torch.zeros(1, 4, 2), alpha=1.0, greedy=True)
        assert got.choice.item() == choice


def test_the_choice_is_gumbel_noise_keyed_by_token_id(op, generator):
    inputs = problem(generator, 50, 8, 3)
    keys = torch.randint(-(2**62), 2**62, (50,), generator=generator)
    got = op(*inputs.values(), alpha=1.0, seed=-12, keys=keys, step=6)
    uniform = philox.uniform(-12, philox.CHOICE, keys[:, None], 6, inputs["token_ids"])
    score = exact(inputs, 1.0, "mean")["final_logprobs"] - (-uniform.log()).log()
    assert got.choice.tolist() == score.argmax(-1).tolist()


def test_keys_default_to_the_rows(op, generator):
    inputs = problem(generator, 6, 8, 3)
    given = op(*inputs.values(), alpha=1.0, keys=torch.arange(6))
    assert torch.equal(given.choice, op(*inputs.values(), alpha=1.0).choice)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_choices_follow_the_final_law(op, generator, alpha):
    num = 20_000
    inputs = problem(generator, 1, 12, 4)
    many = [value.expand(num, *value.shape[1:]) for value in inputs.values()]
    got = op(*many, alpha=alpha, seed=8)
    probabilities = exact(inputs, alpha, "mean")["final_logprobs"][0].exp()
    assert chi_square_excess(got.choice, probabilities) <= 10


@pytest.mark.parametrize(("gap", "k", "rounds"), [(10.0, 16, 1), (12.0, 128, 2)])
def test_the_far_tail_is_chosen_as_often_as_it_should_be(op, gap, k, rounds):
    trees = 2**21 // k
    prior = torch.full((k,), -gap)
    prior[0] = 0.0
    ids = torch.arange(k) * 11
    share = (k - 1) * math.exp(-gap) / (1 + (k - 1) * math.exp(-gap))
    hits = 0
    for seed in range(rounds):
        got = op(
            prior.expand(trees, -1),
            ids.expand(trees, -1),
            torch.zeros(1, 1, 1).expand(trees, k, 1),
            alpha=1.0,
            seed=seed,
        )
        hits += (got.choice > 0).sum().item()
    expected = rounds * trees * share
    assert expected > 20
    assert abs(hits - expected) < 5 * math.sqrt(expected)


def test_the_choice_does_not_depend_on_the_order_of_candidates_or_prompts(op, generator):
    inputs = problem(generator, 40, 9, 3)
    keys = torch.arange(40) + 7
    whole = op(*inputs.values(), alpha=1.0, keys=keys)
    chosen = inputs["token_ids"].gather(1, whole.choice[:, None])
    shuffle = torch.randperm(9, generator=generator)
    moved = {name: value[:, shuffle] for name, value in inputs.items()}
    again = op(*moved.values(), alpha=1.0, keys=keys)
    assert torch.equal(moved["token_ids"].gather(1, again.choice[:, None]), chosen)
    for rows in (slice(3, 4), torch.randperm(40, generator=generator)):
        part = op(*(value[rows] for value in inputs.values()), alpha=1.0, keys=keys[rows])
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0, equal_nan=True)


def test_prompts_steps_and_seeds_are_independent(op):
    trees = 20_000
    arguments = (
        torch.zeros(trees, 2),
        torch.tensor([[3, 5]]).expand(trees, -1),
        torch.zeros(trees, 2, 1),
    )
    coins = [
        op(*arguments, alpha=1.0, seed=seed, step=step).choice * 2.0 - 1
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    products = [coins[0] * coins[1], coins[0] * coins[2], coins[0][1:] * coins[0][:-1], coins[0]]
    for product in products:
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_strided_inputs_and_no_prompts(op, generator):
    inputs = problem(generator, 4, 6, 5)
    wide = {
        name: torch.cat((value, value), dim=0)[::2] if value is not None else None
        for name, value in inputs.items()
    }
    contiguous = {name: value.contiguous() for name, value in wide.items()}
    for a, b in zip(
        op(*wide.values(), alpha=1.0), op(*contiguous.values(), alpha=1.0), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)
    empty = op(*(value[:0] for value in inputs.values()), alpha=1.0)
    assert empty.choice.shape == (0,)
    assert empty.final_logprobs.shape == empty.q.shape == empty.ess.shape == (0, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prior_logprobs": torch.zeros(2)}, r"prior_logprobs .*\[2\].* 2 axes"),
        ({"prior_logprobs": torch.zeros(2, 0)}, "is 0, expected 1"),
        ({"token_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"token_ids .*\[2, 4\].*= \[2, 3\]"),
        ({"token_ids": torch.zeros(2, 3)}, "token_ids is torch.float32"),
        ({"rewards": torch.zeros(2, 3)}, "rewards .* 3 axes"),
        ({"rewards": torch.zeros(2, 4, 5)}, r"rewards .*\[2, 4, 5\].*= \[2, 3, 5\]"),
        ({"log_weights": torch.zeros(2, 3, 4)}, r"log_weights .*\[2, 3, 4\].*= \[2, 3, 5\]"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths .*\[2\].*= \[2, 3\]"),
        ({"lengths": torch.zeros(2, 3)}, "lengths is torch.float32"),
        ({"keys": torch.arange(3)}, r"keys .*\[3\].*= \[2\]"),
        ({"alpha": 0.0}, "alpha is 0.0, expected a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"estimator": "median"}, "estimator is 'median', expected"),
        ({"rewards": torch.zeros(2, 3, 5, requires_grad=True)}, "rewards requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    arguments = {
        "prior_logprobs": torch.zeros(2, 3),
        "token_ids": torch.zeros(2, 3, dtype=torch.int64),
        "rewards": torch.zeros(2, 3, 5),
        "alpha": 1.0,
    } | changes
    rejects(f"reweight_sample: .*{words}", lambda: reweight_sample(**arguments))


def test_compiles_as_one_graph(op, generator):
    def run(prior, ids, rewards, weights, lengths, seed, step):
        return op(prior, ids, rewards, weights, lengths, alpha=0.5, seed=seed, step=step)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for trees in (2, 5):
        arguments = (
            *problem(generator, trees, 4, 3).values(),
            torch.tensor(3),
            torch.tensor(trees),
        )
        for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
