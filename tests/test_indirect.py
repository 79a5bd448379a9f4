"""Indirect transfer: the weights of real roll-outs against a computation by hand.

The rewards below spell out the response, so that a trace tells which roll-outs were drawn.
"""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.naive import next_token_logprobs
from tests.truncation import truncate
from tq_fast.config import SpeedOptions
from tq_fast.errors import InvalidArgument

VOCAB_SIZE, END = 5, 4
PROMPTS = [[1, 3], [2], [0, 0, 1]]
BETA, N = 0.5, 6
SHORT = {
    "k": 3,
    "horizon": 2,
    "max_new_tokens": 3,
    "num_rollouts": N,
    "eos_token_id": END,
    "transfer": "indirect",
    "beta": BETA,
    "alpha": 5.0,
}
# A response is spelled by up to five digits from 1 to 5 in base 6, which is exact in fp32.
DIGITS = 6**5


@functools.cache
def model(seed: int) -> PreTrainedModel:
    model = zoo.language_model("llama", seed=seed, vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model.requires_grad_(False)


def spell(prompts: list, responses: list) -> list[float]:
    """Return a number between 0 and 1 for each response, another one for every response."""
    scores = []
    for response in responses:
        code = 0
        for token in response:
            code = 6 * code + token + 1
        scores.append(code / DIGITS)
    return scores


def read(score: float) -> list[int]:
    """Return the response of which `spell` made `score`."""
    code, response = round(score * DIGITS), []
    while code:
        code, digit = divmod(code, 6)
        response.append(digit - 1)
    return response[::-1]


def spell_otherwise(prompts: list, responses: list) -> list[float]:
    return [score**2 - 0.3 * score for score in spell(prompts, responses)]


def decode(**options: object) -> tq_fast.DecodeResult:
    options = {"sft": model(11), "baseline_reward": spell_otherwise, **SHORT, **options}
    return tq_fast.decode(PROMPTS, model(10), spell, **options)


def expected(rewards: torch.Tensor, log_weights: torch.Tensor) -> tuple[float, float]:
    """Return Q and the effective sample size of one candidate, in fp64."""
    weights = log_weights.double().softmax(-1)
    return float((weights * rewards.double()).sum()), float(1 / weights.square().sum())


@pytest.mark.filterwarnings("ignore:the weights of indirect transfer")
@pytest.mark.parametrize(
    "drawing",
    [
        {},
        {"rollout_temperature": 0.6},
        {"rollout_temperature": 2.0, "rollout_top_k": 4},
        {"rollout_temperature": 1.5, "rollout_top_k": 4, "rollout_top_p": 0.8},
    ],
    ids=str,
)
def test_log_ratio_weighs_by_the_density_that_was_drawn_from(drawing: dict[str, float]) -> None:
    settings = (
        drawing.get("rollout_temperature", 1.0),
        int(drawing.get("rollout_top_k", VOCAB_SIZE)),
        drawing.get("rollout_top_p", 2.0),
    )
    num_weighed = num_apart = 0
    for prompt, trace in zip(PROMPTS, decode(**drawing).traces, strict=True):
        for step, entry in enumerate(trace):
            for idx in range(3):
                rewards = entry.rewards[idx][~entry.rewards[idx].isnan()]
                ratios = torch.zeros(len(rewards), dtype=torch.float64)
                raw = torch.zeros(len(rewards), dtype=torch.float64)
                for i, score in enumerate(rewards.tolist()):
                    response = read(score)
                    for place in range(step + 1, len(response)):
                        context, token = [*prompt, *response[:place]], response[place]
                        law = next_token_logprobs(model(10), context)
                        sft = next_token_logprobs(model(11), context)[token]
                        ratios[i] += sft - truncate(law, *settings)[token]
                        raw[i] += sft - law[token]
                q, ess = expected(rewards, rewards / BETA + ratios)
                assert float(entry.q[idx]) == pytest.approx(q, abs=1e-5)
                assert float(entry.ess[idx]) == pytest.approx(ess, rel=1e-4)
                num_weighed += len(rewards) > 1
                num_apart += abs(expected(rewards, rewards / BETA + raw)[0] - q) > 1e-4
    assert num_weighed > 10
    # Weights by the model's own density differ just where `drawing` changes what is drawn from.
    assert (num_apart > 0) == bool(drawing)


@pytest.mark.filterwarnings("ignore:the weights of indirect transfer")
def test_reward_gap_weighs_by_the_difference_of_the_rewards() -> None:
    for trace in decode(weights="reward_gap").traces:
        for entry in trace:
            for idx in range(3):
                rewards = entry.rewards[idx][~entry.rewards[idx].isnan()].double()
                other = rewards**2 - 0.3 * rewards
                q, ess = expected(rewards, (rewards - other) / BETA)
                assert float(entry.q[idx]) == pytest.approx(q, abs=1e-6)
                assert float(entry.ess[idx]) == pytest.approx(ess, rel=1e-5)


def test_published_weights_are_not_normalised() -> None:
    result = decode(weights="published")
    for trace in result.traces:
        for entry in trace:
            for idx in range(3):
                rewards = entry.rewards[idx][~entry.rewards[idx].isnan()].double()
                other = rewards**2 - 0.3 * rewards
                q = float((((rewards - other) / BETA).exp() * rewards).mean())
                assert float(entry.q[idx]) == pytest.approx(q, rel=1e-5)
    assert all(one.median_ess is None for one in result.certificates)


@pytest.mark.filterwarnings("ignore:the weights of indirect transfer")
def test_log_weights_that_overflow_when_exponentiated_still_normalise() -> None:
    def shifted(prompts: list, responses: list) -> list[float]:
        return [1000.0 + score for score in spell(prompts, responses)]

    options = {"weights": "reward_gap", "baseline_reward": spell_otherwise}
    result = tq_fast.decode(PROMPTS, model(10), shifted, **{**SHORT, **options})
    for trace in result.traces:
        for entry in trace:
            assert entry.q.isfinite().all()
            assert ((entry.q > 1000.0) & (entry.q < 1001.0)).all()


def test_greedy_rollouts_have_no_density_for_log_ratio() -> None:
    with pytest.raises(InvalidArgument, match="rollout='greedy' draws from no density"):
        decode(rollout="greedy")
    assert tq_fast.DecodeConfig(
        transfer="indirect", beta=1.0, rollout="greedy", weights="reward_gap"
    )


def test_weights_that_leave_one_rollout_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=r"of 6 roll-outs in effect.*larger beta") as caught:
        # Roll-outs are long, so that hardly two are the same and share the weight.
        decode(beta=1e-5, weights="reward_gap", horizon=4, max_new_tokens=1)
    assert len(caught) == 1
    # The warning names the line of the caller, wherever in the package it arose.
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(beta=20.0, weights="reward_gap")
        decode(beta=0.001, weights="published", alpha=1e9)


@pytest.mark.parametrize(
    "options", [{"num_rollouts": 1}, {"rollout": "greedy", "weights": "reward_gap"}], ids=str
)
def test_a_single_rollout_is_said_to_weigh_nothing(options: dict[str, object]) -> None:
    with pytest.warns(UserWarning, match="one roll-out a candidate .* equals direct") as caught:
        result = decode(**options)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct = decode(**{**options, "transfer": "direct", "weights": "log_ratio"})
    assert [ids.tolist() for ids in result.sequences] == [ids.tolist() for ids in direct.sequences]


@pytest.mark.filterwarnings("ignore:the weights of indirect transfer")
def test_the_certificate_sums_up_the_effective_sample_sizes() -> None:
    result = decode(beta=0.2)
    for trace, one in zip(result.traces, result.certificates, strict=True):
        told = torch.cat([step.ess[step.num_rollouts > 1] for step in trace])
        assert all(1 <= float(ess) <= N + 1e-4 for ess in told)
        assert one.min_ess == pytest.approx(float(told.min()))
        assert one.median_ess == pytest.approx(float(told.double().quantile(0.5)), abs=1e-5)
        assert one.min_ess < N - 0.1
    direct = decode(transfer="direct").certificates
    assert all(one.min_ess == one.median_ess == N for one in direct)
    single = decode(transfer="direct", num_rollouts=1).certificates
    assert all(one.min_ess is None for one in single)


def test_what_no_theorem_bounds_has_no_bound() -> None:
    bounded = {"reward_bounds": (0.0, 1.0), "alpha": 5.0, "max_new_tokens": 2}
    # A choice that was settled by bounds has no gap reduction, so the lazy arg-max is off.
    bounded["speed"] = SpeedOptions(lazy_argmax=False)
    cases = {
        ("direct", "log_ratio", "sft"): True,
        ("direct", "log_ratio", "baseline"): True,
        ("indirect", "reward_gap", "sft"): True,
        ("indirect", "reward_gap", "baseline"): False,
        ("indirect", "published", "sft"): False,
    }
    for (transfer, weights, prior), is_bounded in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = decode(transfer=transfer, weights=weights, prior=prior, **bounded)
        for one in result.certificates:
            assert (one.kl_bound is not None) == is_bounded
            assert (one.gap_reduction is not None) == (transfer == "direct")
            assert math.isfinite(one.kl_to_sft)
