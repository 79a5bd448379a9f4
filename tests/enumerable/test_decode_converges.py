"""`tq_fast.decode`, run on tables, becomes the exact policy of its world as roll-outs grow."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

import tq_fast
from tests.enumerable.table_model import TableModel, number_of, prompt_of
from tests.enumerable.world import (
    Policy,
    World,
    divergence,
    draw_worlds,
    keep_largest,
    kl_optimum,
    log_law,
    mean_divergence,
    reweight,
    state_values,
)
from tests.ops.statistics import chi_square_excess
from tq_fast import presets

V, T = 4, 3
NUM_WORLDS = V * V
ALPHA, BETA = 0.3, 0.4
# The models compute in fp32, the tests in fp64, and scores are divided by alpha.
ATOL = 2e-6

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


@functools.cache
def world() -> World:
    drawn = draw_worlds(NUM_WORLDS, V, T, torch.Generator().manual_seed(5))
    alpha, beta = (torch.full((NUM_WORLDS,), x, dtype=torch.float64) for x in (ALPHA, BETA))
    return dataclasses.replace(drawn, alpha=alpha, beta=beta)


@functools.cache
def any_policy() -> Policy:
    """Return a baseline that is the optimum of no reward."""
    return draw_worlds(NUM_WORLDS, V, T, torch.Generator().manual_seed(6)).sft


def reward_of(table: torch.Tensor) -> Callable[[list, list], list[float]]:
    def reward(prompts: list, responses: list) -> list[float]:
        worlds = [number_of(prompt, V) for prompt in prompts]
        return table[worlds, [number_of(response, V) for response in responses]].tolist()

    return reward


def decode(baseline: Policy, *, copies: int = 1, **options: object) -> tq_fast.DecodeResult:
    """Decode `copies` responses in each of the worlds, world by world."""
    options = {
        "alpha": ALPHA,
        "k": V,
        "horizon": None,
        "max_new_tokens": T,
        "eos_token_id": (),
        "batch_size": 32,
        **options,
    }
    prompts = [prompt_of(number, V) for number in range(NUM_WORLDS) for _ in range(copies)]
    model, sft = TableModel(baseline), TableModel(world().sft)
    return tq_fast.decode(prompts, model, reward_of(world().reward), sft=sft, **options)


def states(result: tq_fast.DecodeResult) -> list[tuple[int, int, int, tq_fast.StepTrace]]:
    """Return (world, step, history, trace) of every step."""
    copies = len(result.traces) // NUM_WORLDS
    found = []
    for idx, (ids, trace) in enumerate(zip(result.sequences, result.traces, strict=True)):
        for step, entry in enumerate(trace):
            history = number_of(ids[:step].tolist(), V)
            found.append((idx // copies, step, history, entry))
    return found


def distances(result: tq_fast.DecodeResult, exact: Policy) -> torch.Tensor:
    """Return the total variation from pi_alg to `exact` at every step that has roll-outs."""
    found = []
    for number, step, history, entry in states(result):
        if step < T - 1:
            law = exact[step][number, history, entry.candidates].exp()
            found.append((entry.final_logprobs.exp() - law).abs().sum() / 2)
    return torch.stack(found)


def transfer_optimum() -> list[torch.Tensor]:
    """Return Q of the policy that is aligned to the target reward."""
    return state_values(kl_optimum(world().sft, world().reward, world().beta), world().reward)


def aligned_otherwise() -> Policy:
    return kl_optimum(world().sft, world().baseline_reward, world().beta)


INDIRECT = {"transfer": "indirect", "beta": BETA}


def cases() -> dict[str, tuple[Policy, list[torch.Tensor], dict[str, object]]]:
    """Return baseline, exact values and settings, by name."""
    reward, baseline = world().reward, any_policy()
    soft = [ALPHA * value.log() for value in state_values(baseline, (reward / ALPHA).exp())]
    gap = {**INDIRECT, "weights": "reward_gap"}
    gap["baseline_reward"] = reward_of(world().baseline_reward)
    return {
        "direct": (baseline, state_values(baseline, reward), {}),
        "direct, soft": (baseline, soft, {"estimator": "soft"}),
        "log-ratio": (baseline, transfer_optimum(), {**INDIRECT, "rollout_temperature": 1.5}),
        "reward gap": (aligned_otherwise(), transfer_optimum(), gap),
    }


ROLLOUTS = (8, 32, 128)


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("direct", "sft"),
        ("direct", "baseline"),
        ("direct, soft", "sft"),
        ("log-ratio", "sft"),
        ("log-ratio", "baseline"),
        ("reward gap", "sft"),
        ("reward gap", "baseline"),
    ],
)
def test_the_distance_to_the_exact_policy_falls_as_one_over_root_n(name: str, prior: str) -> None:
    baseline, values, options = cases()[name]
    anchor = world().sft if prior == "sft" else baseline
    exact = reweight(anchor, values, world().alpha)
    found = [
        distances(decode(baseline, copies=3, num_rollouts=n, prior=prior, **options), exact)
        for n in ROLLOUTS
    ]
    means = torch.tensor([distance.mean() for distance in found]).log()
    errors = torch.tensor([d.std() / d.mean() / math.sqrt(len(d)) for d in found])
    scale = torch.tensor(ROLLOUTS, dtype=torch.float32).log()
    weights = (scale - scale.mean()) / (scale - scale.mean()).square().sum()
    slope = float((weights * means).sum())
    standard_error = float((weights * errors).square().sum().sqrt())
    # Beyond 1 / sqrt(n) there are terms of 1 / n, a few hundredths of the slope from n = 8 on.
    assert abs(slope + 0.5) < 4 * standard_error + 0.03
    if options.get("transfer") == "indirect":
        # Without weights the same roll-outs lead elsewhere, and more of them do not help.
        plain = decode(baseline, copies=3, num_rollouts=ROLLOUTS[-1], prior=prior)
        assert distances(plain, exact).mean() > 2 * found[-1].mean()


def greedy(policy: Policy) -> Policy:
    """Return the policy that always takes the likeliest token."""
    return [
        torch.full_like(table, -math.inf).scatter(-1, table.argmax(-1, keepdim=True), 0.0)
        for table in policy
    ]


def path_sum(per_state: Sequence[torch.Tensor], number: int, ids: Sequence[int]) -> float:
    """Return the sum of `per_state` `[M, V**t]` over the states that lead to `ids`."""
    states = [number_of(ids[:step], V) for step in range(T)]
    return sum(float(table[number, state]) for table, state in zip(per_state, states, strict=True))


@pytest.mark.parametrize("k", [V, 2])
@pytest.mark.parametrize("prior", ["sft", "baseline"])
@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_with_greedy_rollouts_decode_is_exact_and_so_is_its_certificate(
    strategy: str, prior: str, k: int
) -> None:
    baseline, sft = any_policy(), world().sft
    anchor = sft if prior == "sft" else baseline
    kept = keep_largest(baseline, k)
    values = state_values(greedy(baseline), world().reward)
    exact = reweight(anchor, values, world().alpha, kept)
    options = {"copies": 4, "rollout": "greedy", "strategy": strategy, "prior": prior, "k": k}
    result = decode(baseline, **options)
    for number, step, history, entry in states(result):
        ids = entry.candidates
        expected = kept[step][number, history].topk(k).indices
        assert ids.tolist() == expected.tolist()
        law = exact[step][number, history, ids]
        torch.testing.assert_close(entry.final_logprobs.double(), law, rtol=0, atol=ATOL)
        torch.testing.assert_close(
            entry.q.double(), values[step][number, history, ids], rtol=0, atol=ATOL
        )
        if strategy == "greedy":
            assert entry.choice == int(law.argmax())

    def sums(p: Policy, q: Policy) -> list[torch.Tensor]:
        return [divergence(a, b) for a, b in zip(p, q, strict=True)]

    to_sft, to_baseline, drift = sums(exact, sft), sums(exact, baseline), sums(baseline, sft)
    masses = [
        a.masked_fill(b == -math.inf, -math.inf).logsumexp(-1)
        for a, b in zip(anchor, kept, strict=True)
    ]
    for idx, (ids, one) in enumerate(zip(result.sequences, result.certificates, strict=True)):
        along = functools.partial(path_sum, number=idx // 4, ids=ids.tolist())
        assert one.kl_to_sft == pytest.approx(along(to_sft), abs=T * ATOL)
        assert one.kl_to_baseline == pytest.approx(along(to_baseline), abs=T * ATOL)
        assert one.log_prior_mass == pytest.approx(along(masses), abs=T * ATOL)
        steps = result.traces[idx]
        assert sum(step.kl_baseline_to_sft for step in steps) == pytest.approx(
            along(drift), abs=T * ATOL
        )
        reduction = along(to_baseline) if prior == "baseline" else along(to_sft) - along(drift)
        assert one.gap_reduction == pytest.approx(ALPHA * reduction, abs=T * ATOL)
        assert one.kl_bound is None
    # With bounds on the reward some values stay unknown, and the divergence is an upper bound.
    bounded = decode(baseline, beta=BETA, reward_bounds=(0.0, 1.0), **options)
    for idx, (ids, one) in enumerate(zip(bounded.sequences, bounded.certificates, strict=True)):
        assert torch.equal(ids, result.sequences[idx])
        along = functools.partial(path_sum, number=idx // 4, ids=ids.tolist())
        bound = T / ALPHA - along(masses) + (1 / BETA if prior == "baseline" else 0.0)
        assert one.kl_bound == pytest.approx(bound, abs=T * ATOL)
        assert along(to_sft) - T * ATOL <= one.kl_to_sft <= one.kl_bound


def test_controlled_decoding_is_exact_with_greedy_rollouts_of_the_sft_model() -> None:
    sft = world().sft
    exact = reweight(sft, state_values(greedy(sft), world().reward), world().alpha)
    result = presets.controlled_decoding(
        [prompt_of(number, V) for number in range(NUM_WORLDS)],
        reward=reward_of(world().reward),
        sft=TableModel(sft),
        rollout="greedy",
        k=V,
        alpha=ALPHA,
        horizon=None,
        max_new_tokens=T,
        eos_token_id=(),
    )
    for number, step, history, entry in states(result):
        law = exact[step][number, history, entry.candidates]
        torch.testing.assert_close(entry.final_logprobs.double(), law, rtol=0, atol=ATOL)


@pytest.mark.parametrize("mix", [0.4, 1.5])
def test_dera_draws_from_the_exact_mixture(mix: float) -> None:
    sft, baseline, copies = world().sft, any_policy(), 100
    mixture = [
        ((1 - mix) * a + mix * b).log_softmax(-1) for a, b in zip(sft, baseline, strict=True)
    ]
    result = presets.dera(
        [prompt_of(number, V) for number in range(NUM_WORLDS) for _ in range(copies)],
        TableModel(baseline),
        sft=TableModel(sft),
        mix=mix,
        max_new_tokens=T,
        eos_token_id=(),
        batch_size=800,
    )
    drawn = torch.tensor(
        [
            V**T * (idx // copies) + number_of(ids.tolist(), V)
            for idx, ids in enumerate(result.sequences)
        ]
    )
    assert chi_square_excess(drawn, log_law(mixture).exp().flatten() / NUM_WORLDS) < 10
    for policy in (sft, baseline):
        assert chi_square_excess(drawn, log_law(policy).exp().flatten() / NUM_WORLDS) > 10
    divergences = [divergence(a, b) for a, b in zip(mixture, sft, strict=True)]
    for idx, (ids, one) in enumerate(zip(result.sequences, result.certificates, strict=True)):
        expected = path_sum(divergences, idx // copies, ids.tolist())
        assert one.kl_to_sft == pytest.approx(expected, abs=T * ATOL)


@pytest.mark.parametrize("prior", ["sft", "baseline"])
def test_the_mean_certificate_is_the_divergence_of_responses_and_keeps_to_the_bound(
    prior: str,
) -> None:
    """The baseline is the optimum that the theorem asks for, and its roll-outs are many."""
    copies, num_rollouts, sft = 12, 64, world().sft
    baseline = kl_optimum(sft, world().reward, world().beta)
    values = state_values(baseline, world().reward)
    exact = reweight(baseline if prior == "baseline" else sft, values, world().alpha)
    options = {"copies": copies, "num_rollouts": num_rollouts, "prior": prior}
    result = decode(baseline, **options)
    bounded = decode(baseline, beta=BETA, reward_bounds=(0.0, 1.0), **options)
    assert all(one.kl_to_sft <= one.kl_bound for one in bounded.certificates)
    truths = {
        "kl_to_sft": divergence(log_law(exact), log_law(sft)),
        "kl_to_baseline": divergence(log_law(exact), log_law(baseline)),
    }
    to_sft = mean_divergence(exact, exact, sft)
    torch.testing.assert_close(truths["kl_to_sft"], to_sft)
    drift = mean_divergence(exact, baseline, sft)
    truths["gap_reduction"] = ALPHA * (
        truths["kl_to_baseline"] if prior == "baseline" else to_sft - drift
    )
    # Noise in Q makes pi_alg vary, which adds up to half the variance of Q / alpha to a divergence;
    # rewards in [0, 1] drawn evenly have a standard deviation of 0.29.
    noise = (T - 1) * (0.29 / ALPHA) ** 2 / (2 * num_rollouts)
    for name, truth in truths.items():
        found = torch.tensor([getattr(one, name) for one in result.certificates])
        found = found.view(NUM_WORLDS, copies).double()
        error = found - truth[:, None]
        allowed = noise * (ALPHA if name == "gap_reduction" else 1.0)
        spread = float(error.std()) / math.sqrt(error.numel())
        assert abs(float(error.mean())) < 4 * spread + allowed
    # The exact gap keeps to the bound of the theorem, from which the gap reduction is taken off.
    law = log_law(exact).exp()
    gap = world().reward.max(-1).values - (law * world().reward).sum(-1)
    best = world().reward.argmax(-1, keepdim=True)
    start = -BETA * log_law(sft).gather(1, best).squeeze(1)
    assert (gap <= start - truths["gap_reduction"] + 1e-9).all()


def test_responses_follow_the_exact_law_of_whole_responses() -> None:
    baseline, copies = any_policy(), 100
    values = state_values(greedy(baseline), world().reward)
    options = {"rollout": "greedy", "copies": copies, "batch_size": 800}
    laws = {
        prior: log_law(reweight(anchor, values, world().alpha)).exp().flatten() / NUM_WORLDS
        for prior, anchor in (("sft", world().sft), ("baseline", baseline))
    }
    for prior, other in (("sft", "baseline"), ("baseline", "sft")):
        result = decode(baseline, prior=prior, **options)
        drawn = torch.tensor(
            [
                V**T * (idx // copies) + number_of(ids.tolist(), V)
                for idx, ids in enumerate(result.sequences)
            ]
        )
        assert chi_square_excess(drawn, laws[prior]) < 10
        assert chi_square_excess(drawn, laws[other]) > 10


def test_the_law_averaged_over_rollouts_is_closer_to_sft_than_the_law_given_them() -> None:
    """That is why the divergence is "at most" with sampled roll-outs and "exact" without."""
    copies = 64
    shares = {}
    for rollout in ("sample", "greedy"):
        result = decode(any_policy(), copies=copies, num_rollouts=1, rollout=rollout)
        own = given = 0.0
        for number in range(NUM_WORLDS):
            first = [trace[0] for trace in result.traces[number * copies :][:copies]]
            laws = torch.zeros(copies, V, dtype=torch.float64)
            for law, step in zip(laws, first, strict=True):
                law[step.candidates] = step.final_logprobs.double().exp()
            sft = world().sft[0][number, 0]
            own += float(divergence(laws.mean(0).log(), sft))
            given += sum(step.kl_to_sft for step in first) / copies
        shares[rollout] = own / given
        kinds = {one.kl_kind for one in result.certificates}
        assert kinds == {"at most" if rollout == "sample" else "exact"}
    assert shares["greedy"] == pytest.approx(1.0, abs=1e-5)
    assert shares["sample"] < 0.8
