"""Collab: with one baseline it is Transfer Q*, with two the naive choice between both."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import PreTrainedModel

from tests import zoo
from tests.naive import NaiveSettings, classifier_reward, complete, next_token_logprobs
from tests.presets.test_presets import ATOL, ENDS, PROMPTS, SHORT, models, run, third_model, tokens
from tq_fast import DecodeResult, presets
from tq_fast.errors import InvalidArgument

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")

GREEDY = {"strategy": "greedy", "rollout": "greedy", "eos_token_id": ENDS}


def both() -> list[PreTrainedModel]:
    return [models()["baseline"], third_model()]


# Candidates of each baseline, enough for some to be proposed by both.
NUM_OFFERED = 8


@dataclasses.dataclass
class Offer:
    """The best that any baseline promises for a token."""

    agent: int
    q: float
    prior_logprob: float


def offers(context: list[int], prior: PreTrainedModel) -> dict[int, Offer]:
    """What two baselines offer after `context`, by token: k candidates each, greedy roll-outs."""
    settings = NaiveSettings(horizon=3, eos_token_id=ENDS)
    score = classifier_reward(models()["reward"])
    prior_law = next_token_logprobs(prior, context)
    found: dict[int, Offer] = {}
    for agent, model in enumerate(both()):
        law = next_token_logprobs(model, context)
        for token in law.sort(descending=True, stable=True).indices[:NUM_OFFERED].tolist():
            tail: list[int] = []
            if token not in ENDS:
                (tail,) = complete(model, [[*context, token]], settings.horizon, settings)
            (q,) = score([[*context, token, *tail]])
            if token not in found or q > found[token].q:
                found[token] = Offer(agent, q, float(prior_law[token]))
    return found


@pytest.mark.parametrize("prior", ["sft", "baseline"])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "sample", "num_rollouts": 2},
        {"strategy": "greedy", "rollout": "greedy"},
        {"strategy": "greedy", "num_rollouts": 2, "reward_bounds": (-20.0, 20.0)},
        {"strategy": "sample", "candidates_from": "sft", "horizon": None, "min_new_tokens": 3},
    ],
    ids=["sampled", "greedy", "bounded", "to-the-end"],
)
def test_one_baseline_is_transfer_q_token_for_token(prior: str, options: dict[str, object]) -> None:
    given = {**options, "prior": prior, "eos_token_id": ENDS, "seed": 5}
    alone = run("transfer_q", **given)
    ours = run("collab", baselines=[models()["baseline"]], **given)
    assert tokens(ours) == tokens(alone)
    for one, other in zip(ours.traces, alone.traces, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            known = ~theirs.q.isnan()
            assert torch.equal(mine.candidates, theirs.candidates)
            torch.testing.assert_close(mine.q[known], theirs.q[known], rtol=0, atol=ATOL)
            assert mine.agents.tolist() == [0] * len(mine.candidates)
    for one, other in zip(ours.certificates, alone.certificates, strict=True):
        assert one.prior == other.prior == prior
        if "reward_bounds" not in options:
            assert one.kl_to_sft == pytest.approx(other.kl_to_sft, abs=10 * ATOL)
            assert one.kl_to_baseline == pytest.approx(other.kl_to_baseline, abs=10 * ATOL)
            assert one.kl_kind == other.kl_kind


def test_one_baseline_costs_what_transfer_q_costs() -> None:
    options = {**GREEDY, "eos_token_id": ()}
    alone = run("transfer_q", PROMPTS[:3], **options).stats
    ours = run("collab", PROMPTS[:3], baselines=[models()["baseline"]], **options).stats
    assert set(ours.token_forwards) == set(alone.token_forwards)
    assert ours.num_steps == alone.num_steps
    assert ours.token_forwards["sft"] == alone.token_forwards["sft"]
    # Transfer Q* reuses the chosen token's roll-out as that of its child.
    assert ours.token_forwards["baseline"] >= alone.token_forwards["baseline"]


@pytest.mark.parametrize("prior", ["sft", "baseline"])
def test_two_baselines_choose_as_the_naive_computation_does(prior: str) -> None:
    # Without an SFT model the first baseline is the prior.
    given = {"sft": models()["sft"] if prior == "sft" else None, "k": NUM_OFFERED}
    result = run("collab", PROMPTS[:2], **given, **GREEDY)
    spoke, is_shared = set(), False
    for prompt, ids, trace in zip(PROMPTS, tokens(result), result.traces, strict=False):
        for step, entry in enumerate(trace):
            with torch.no_grad():
                truth = offers([*prompt, *ids[:step]], models()[prior])
            assert sorted(entry.candidates.tolist()) == sorted(truth)
            is_shared = is_shared or len(truth) < 2 * NUM_OFFERED
            for i, token in enumerate(entry.candidates.tolist()):
                offer = truth[token]
                assert int(entry.agents[i]) == offer.agent
                assert float(entry.q[i]) == pytest.approx(offer.q, abs=ATOL)
                found = float(entry.prior_logprobs[i])
                assert found == pytest.approx(offer.prior_logprob, abs=ATOL)
            best = max(truth, key=lambda token: truth[token].prior_logprob + truth[token].q)
            assert entry.token_id == ids[step] == best
            assert int(entry.agents[entry.choice]) == truth[best].agent
            spoke.add(truth[best].agent)
    assert is_shared and (prior != "sft" or spoke == {0, 1})
    assert [one.prior for one in result.certificates] == [prior] * 2
    assert all((one.kl_to_sft is None) == (prior != "sft") for one in result.certificates)


def check_laws(result: DecodeResult, alpha: float) -> None:
    for prompt, ids, trace, one in zip(
        PROMPTS, tokens(result), result.traces, result.certificates, strict=True
    ):
        totals = [0.0, 0.0]
        for step, entry in enumerate(trace):
            context = [*prompt, *ids[:step]]
            assert len(set(entry.candidates.tolist())) == len(entry.candidates)
            law = (entry.prior_logprobs + entry.q / alpha).double().log_softmax(-1)
            torch.testing.assert_close(entry.final_logprobs.double(), law, rtol=0, atol=ATOL)
            for place, role in enumerate(("sft", "baseline")):
                own = next_token_logprobs(models()[role], context)[entry.candidates]
                totals[place] += float((law.exp() * (law - own)).sum())
        assert one.kl_to_sft == pytest.approx(totals[0], abs=20 * ATOL)
        assert one.kl_to_baseline == pytest.approx(totals[1], abs=20 * ATOL)


def test_a_sampled_token_comes_from_the_softmax_over_both() -> None:
    options = {"strategy": "sample", "num_rollouts": 2, "alpha": 0.7, "eos_token_id": ENDS}
    result = run("collab", **options)
    check_laws(result, 0.7)
    # Every token is drawn from its law: the mean log-prob of draws is minus the entropy.
    many = run("collab", [[5, 6, 7]] * 60, **{**options, "max_new_tokens": 1})
    surprise, spread = 0.0, 0.0
    for (entry,) in many.traces:
        law = entry.final_logprobs.double()
        mean = float((law.exp() * law).sum())
        surprise += float(law[entry.choice]) - mean
        spread += float((law.exp() * (law - mean) ** 2).sum())
    assert abs(surprise) < 4 * math.sqrt(spread)
    assert len({int(entry.agents[entry.choice]) for (entry,) in many.traces}) == 2


def test_the_same_model_twice_rolls_out_with_other_random_streams() -> None:
    base = models()["baseline"]
    options = {"strategy": "sample", "num_rollouts": 3, "eos_token_id": ()}
    (trace,) = run("collab", [[5, 6, 7]], baselines=[base, base], **options).traces
    # Both propose the same candidates, of which the better draw of each stays.
    assert all(len(entry.candidates) == SHORT["k"] for entry in trace)
    assert {int(agent) for entry in trace for agent in entry.agents} == {0, 1}


def test_every_baseline_is_counted() -> None:
    stats = run("collab", PROMPTS[:2], **GREEDY).stats
    assert set(stats.token_forwards) == {"baseline", "baseline_2", "sft", "reward"}
    assert set(stats.peak_kv_bytes) == set(stats.token_forwards)
    assert all(count > 0 for count in stats.token_forwards.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": []}, "baselines must be a list of at least one model"),
        ({"baselines": None}, "baselines must be a list of at least one model, got None"),
        ({"baselines": "folder"}, "baselines must be a list of at least one model, got 'folder'"),
        ({"baseline": "folder"}, "baseline has no part in 'collab'; it takes a list, baselines"),
        ({"transfer": "indirect", "beta": 1.0}, "transfer is 'direct' for the method 'collab'"),
        ({"reward": None}, "reward is needed by the method 'collab'"),
    ],
)
def test_bad_options_of_collab_are_refused(options: dict[str, object], message: str) -> None:
    given = {**models(), "baseline": None, "baselines": both(), **SHORT, **options}
    with pytest.raises(InvalidArgument, match=message):
        presets.collab(PROMPTS, **given)


def test_baselines_that_are_none_or_of_another_vocabulary_are_named() -> None:
    base = models()["baseline"]
    with pytest.raises(InvalidArgument, match="that of baseline_2 is None"):
        run("collab", baselines=[base, None])
    other = zoo.language_model("llama", vocab_size=99)
    with pytest.raises(InvalidArgument, match="baseline_2 and baseline must have the same"):
        run("collab", baselines=[base, other])
