"""The ceiling against worlds of a few responses, where every law can be written down."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tq_fast.evaluation.ceiling import (
    LEAST_ESS,
    ceiling_at,
    ceiling_curve,
    read_curve,
    summarise_ceiling,
    write_ceiling,
)

PROMPTS, RESPONSES = 32, 30
ALPHAS = [2.0, 1.0, 0.5, 0.25]


def world() -> tuple[np.ndarray, np.ndarray]:
    """Return pi_sft and the reward of every response `[PROMPTS, RESPONSES]`."""
    generator = np.random.default_rng(3)
    laws = generator.dirichlet(np.ones(RESPONSES), PROMPTS)
    return laws, generator.normal(size=(PROMPTS, RESPONSES))


def kl_of(q: np.ndarray, p: np.ndarray) -> float:
    """Return the mean divergence of laws that are nowhere 0."""
    return float((q * np.log(q / p)).sum(1).mean())


def tilted(alpha: float) -> np.ndarray:
    laws, rewards = world()
    law = laws * np.exp(rewards / alpha)
    return law / law.sum(1, keepdims=True)


def exact(alpha: float) -> tuple[float, float]:
    """Return the divergence and the reward of the exact curve."""
    laws, rewards = world()
    law = tilted(alpha)
    return kl_of(law, laws), float((law * rewards).sum(1).mean())


def draw(num: int, seed: int) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    laws, rewards = world()
    return [generator.choice(r, num, p=p).tolist() for p, r in zip(laws, rewards, strict=True)]


def test_a_large_pool_gives_the_exact_curve() -> None:
    laws, rewards = world()
    first, *curve = ceiling_curve(draw(50_000, seed=0), ALPHAS)
    assert (first.alpha, first.ess) == (np.inf, pytest.approx(50_000))
    assert first.kl == pytest.approx(0.0, abs=1e-9)
    assert first.value == pytest.approx(float((laws * rewards).sum(1).mean()), abs=0.01)
    for point, alpha in zip(curve, ALPHAS, strict=True):
        kl, value = exact(alpha)
        assert point.alpha == alpha
        assert point.kl == pytest.approx(kl, abs=0.02)
        assert point.value == pytest.approx(value, abs=0.01)


def test_no_law_over_the_pool_is_above_the_curve_however_it_spends_its_divergence() -> None:
    """That includes laws that spend more of it on some prompts than on others."""
    pools = np.array(draw(64, seed=1))
    even = np.full_like(pools, 1 / 64)
    curve = ceiling_curve(pools.tolist())
    kls, values = [point.kl for point in curve], [point.value for point in curve]
    assert kls == sorted(kls) and values == sorted(values)
    generator = np.random.default_rng(4)
    for _ in range(300):
        alpha = np.exp(generator.normal(size=(PROMPTS, 1)))
        noise = generator.normal(size=pools.shape) * generator.random()
        law = np.exp(pools / alpha + noise)
        law /= law.sum(1, keepdims=True)
        # The curve is concave, so that between two points it lies above the line.
        highest = np.interp(kl_of(law, even), kls, values)
        assert (law * pools).sum(1).mean() <= highest + 1e-3
    # The best of n among the texts of the pool, whose law is known exactly, is a law over it.
    order = pools.argsort(1).argsort(1)
    for n in (2, 4, 8):
        law = ((order + 1) / 64) ** n - (order / 64) ** n
        assert (law * pools).sum(1).mean() <= np.interp(kl_of(law, even), kls, values) + 1e-3


def test_small_pools_lie_below_the_curve_by_about_what_is_said() -> None:
    num, alpha = 128, 0.4
    kls, values = zip(*(exact(alpha) for alpha in np.geomspace(4.0, 0.05, 200)), strict=True)
    shortfalls, expected = [], []
    for seed in range(100):
        point = ceiling_curve(draw(num, seed), [alpha])[1]
        shortfalls.append(np.interp(point.kl, kls, values) - point.value)
        expected.append(alpha / 2 * (1 / point.ess - 1 / num))
    error = np.std(shortfalls) / np.sqrt(len(shortfalls))
    assert np.mean(shortfalls) > 4 * error
    # The formula is of the first order in 1 / ESS, and for many prompts.
    assert np.mean(shortfalls) == pytest.approx(np.mean(expected), abs=3 * error + 0.003)


def test_where_few_texts_carry_the_weights_the_curve_is_not_trusted() -> None:
    curve = ceiling_curve(draw(64, seed=2))
    assert all(0.0 <= point.kl <= np.log(64) + 1e-9 for point in curve)
    trusted = [point for point in curve if point.is_trusted]
    assert trusted == curve[: len(trusted)] and 0 < len(trusted) < len(curve)
    assert trusted[-1].ess >= LEAST_ESS > curve[len(trusted)].ess
    assert curve[-1].ess < 4
    last = trusted[-1]
    assert ceiling_at(curve, last.kl) == pytest.approx(last.value)
    assert ceiling_at(curve, last.kl + 1e-6) is None
    assert ceiling_at(curve, 0.0) == pytest.approx(curve[0].value)
    # A pool smaller than the least sample size says nothing at all.
    assert ceiling_at(ceiling_curve(draw(4, seed=2)), 0.0) is None


def test_a_reward_that_never_differs_has_one_point() -> None:
    (point,) = ceiling_curve([[2.0] * 16, [2.0] * 16])
    assert (point.kl, point.value) == (0.0, 2.0) and point.ess == pytest.approx(16)


def test_rewards_of_any_size_give_the_same_curve() -> None:
    pools = np.array(draw(64, seed=5))
    for scale in (1e-20, 1e20):
        for ours, theirs in zip(
            ceiling_curve((pools * scale).tolist()), ceiling_curve(pools.tolist()), strict=True
        ):
            assert ours.kl == pytest.approx(theirs.kl, abs=1e-9)
            assert ours.value == pytest.approx(theirs.value * scale, rel=1e-6, abs=1e-6 * scale)


def test_the_summary_of_pools_is_json_and_a_table() -> None:
    pools = draw(64, seed=6)
    records = [{"scores": {"reward": pool, "judge": pool}} for pool in pools]
    records += [{"error": {"type": "X", "message": "m"}}]
    summary = json.loads(json.dumps(summarise_ceiling(records), allow_nan=False))
    assert (summary["num_texts"], summary["num_prompts"]) == (64, PROMPTS)
    assert list(summary["curves"]) == ["reward"]
    curve = read_curve(summary["curves"]["reward"])
    assert curve == ceiling_curve(pools)
    table = write_ceiling(summary)
    assert "| KL to SFT, nats | highest reward |" in table
    assert f"| 1 | {ceiling_at(curve, 1.0):.2f} |" in table and "| 5 |" not in table
    assert summarise_ceiling(records[-1:]) is None and summarise_ceiling([]) is None
    # A text without a score leaves its prompt out of that curve.
    records[0]["scores"]["gold"] = [None, *pools[0][1:]]
    records[1]["scores"]["gold"] = pools[1]
    assert read_curve(summarise_ceiling(records)["curves"]["gold"]) == ceiling_curve([pools[1]])
