"""Heads that read the reward model's states beside the prior's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.presets.test_fitting import states_before
from tests.presets.test_presets import ATOL, PROMPTS, models, tokens
from tests.presets.test_value_guided import q_in_fp64, random_head
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.presets import fitting
from tq_fast.presets.sources import prior_fingerprint
from tq_fast.values.head import ValueHead

SHORT = {"max_new_tokens": 4, "eos_token_id": ()}


def both() -> list[PreTrainedModel]:
    return [models()["sft"], models()["reward"]]


def head_of_both() -> ValueHead:
    """A head of random weights for the SFT model and the reward."""
    prior, reward = both()
    size = prior.config.hidden_size + reward.config.hidden_size
    known = {"prior": prior_fingerprint(prior), "reward": prior_fingerprint(reward)}
    return random_head(prior, hidden_size=size, reward_states=True, models=known)


def guided(prompts: object = PROMPTS, **options: object) -> tq_fast.DecodeResult:
    prior, reward = both()
    given = {"sft": prior, "reward": reward, "value": head_of_both(), **SHORT, **options}
    return presets.value_guided(prompts, **given)


def test_the_law_of_a_step_is_that_of_both_states() -> None:
    head = head_of_both()
    result = guided(PROMPTS[:2], alpha=0.8)
    for prompt, ids, trace in zip(PROMPTS, tokens(result), result.traces, strict=False):
        states = torch.cat([states_before(model, prompt, ids) for model in both()], 1)
        prior = both()[0]
        with torch.no_grad():
            logits = prior(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        for step, entry in enumerate(trace):
            value, q = q_in_fp64(head, states[step])
            policy = logits[step].double().log_softmax(-1)
            law = (policy + q / 0.8).log_softmax(-1)
            assert entry.value == pytest.approx(value, abs=ATOL)
            assert float(entry.final_logprobs) == pytest.approx(float(law[ids[step]]), abs=ATOL)
            divergence = float((law.exp() * (law - policy)).sum())
            assert entry.kl_to_sft == pytest.approx(divergence, abs=ATOL)


def test_results_do_not_depend_on_the_batch() -> None:
    together = tokens(guided(seed=2))
    assert tokens(guided(seed=2, batch_size=2)) == together
    assert tokens(guided(PROMPTS[1], seed=2)) == [together[1]]


@pytest.mark.parametrize("method", ["best_of_n", "refine", "blocks"])
def test_methods_that_choose_between_texts_draw_from_it(method: str) -> None:
    prior, reward = both()
    own = {
        "best_of_n": {"n": 2},
        "refine": {"first": 2, "branches": 2, "stages": 2},
        "blocks": {"branches": 2, "block_len": 2},
    }[method]
    options = {"sft": prior, "reward": reward, "source": "value", "value": head_of_both(), **SHORT}
    together = presets.METHODS[method](PROMPTS, **options, **own)
    alone = presets.METHODS[method](PROMPTS[1], **options, **own)
    assert tokens(alone) == [tokens(together)[1]]
    counts = together.stats.token_forwards
    assert counts["reward_states"] == counts["sft"] and counts["reward"] > 0


def test_a_fit_reads_both_states_before_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, reward = both()
    seen = []
    fit_head = fitting.fit_head
    monkeypatch.setattr(
        fitting, "fit_head", lambda tokens, *rest: (seen.append(tokens), fit_head(tokens, *rest))[1]
    )
    options = {"num_texts": 3, "epochs": 1, **SHORT}
    head = tq_fast.fit_value(PROMPTS, sft=prior, reward=reward, reward_states=True, **options)
    drawn = presets.best_of_n(PROMPTS, sft=prior, reward=reward, source="sft", n=3, **SHORT)
    states = [
        torch.cat([states_before(model, prompt, text) for model in both()], 1)
        for prompt, stages in zip(PROMPTS, drawn.stages, strict=True)
        for text in stages[0].sequences
    ]
    torch.testing.assert_close(seen[0].hidden, torch.cat(states), rtol=0, atol=ATOL)
    assert head.config.reward_states
    result = presets.value_guided(PROMPTS, sft=prior, reward=reward, value=head, **SHORT)
    assert [len(ids) for ids in tokens(result)] == [4] * len(PROMPTS)


def test_a_reward_whose_states_cannot_be_read_is_refused() -> None:
    prior = both()[0]
    with pytest.raises(InvalidArgument, match="reads the states of the reward model; pass reward="):
        guided(reward=None)
    with pytest.raises(InvalidArgument, match="read off a causal sequence classifier"):
        guided(reward=lambda prompts, responses: [0.0] * len(prompts))
    with pytest.raises(InvalidArgument, match="states of another reward model"):
        guided(reward=zoo.classifier("llama", seed=7))
    with pytest.raises(InvalidArgument, match="read off a causal sequence classifier"):
        tq_fast.fit_value(
            PROMPTS, sft=prior, reward=lambda p, r: [0.0] * len(p), reward_states=True, **SHORT
        )
    narrow = copy.deepcopy(head_of_both())
    object.__setattr__(narrow.config, "hidden_size", 7)
    with pytest.raises(InvalidArgument, match="value reads states of 7 numbers"):
        guided(value=narrow)
