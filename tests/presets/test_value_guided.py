"""Value guidance: every step's law and divergence against the plain model and the head in fp64."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests import zoo
from tests.naive import classifier_reward
from tests.presets.test_plain import (
    BOUND,
    END,
    START,
    excess,
    small_law,
    small_model,
)
from tests.presets.test_presets import (
    ATOL,
    ENDS,
    PROMPTS,
    SHORT,
    models,
    run,
    third_model,
    tokens,
    value_head,
)
from tests.truncation import truncate
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.presets.sources import prior_fingerprint
from tq_fast.values.head import ValueHead, ValueHeadConfig

PLAIN = (1.0, zoo.VOCAB_SIZE, 2.0)


def random_head(
    model: PreTrainedModel, seed: int = 3, *, scale: float = 0.6, **changes: object
) -> ValueHead:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "width": 8,
        "rank": 4,
        **changes,
    }
    head = ValueHead(ValueHeadConfig(**fields))
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return head.requires_grad_(False)


def q_in_fp64(head: ValueHead, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
    """V and Q `[V]` after the state `[D]`, written out."""
    state = {name: weight.double() for name, weight in head.state_dict().items()}
    x = (hidden.double() - state["hidden_mean"]) / state["hidden_scale"]
    for layer in ("trunk.0", "trunk.2"):
        x = state[f"{layer}.weight"] @ x + state[f"{layer}.bias"]
        x = x * torch.sigmoid(x)
    value = state["value.weight"] @ x + state["value.bias"]
    value = value * state["reward_scale"] + state["reward_mean"]
    direction = (state["direction.weight"] @ x + state["direction.bias"]) * state["reward_scale"]
    return float(value), value + state["token_embeddings"] @ direction


def prior_and_q(
    model: PreTrainedModel, head: ValueHead, ids: list[int]
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Log pi_prior `[V]`, V and Q `[V]` after `ids`, in fp64."""
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        logits = model.lm_head(hidden)
    value, q = q_in_fp64(head, hidden)
    return logits.double().log_softmax(-1), value, q


def divergence(law: torch.Tensor, other: torch.Tensor) -> float:
    kept = law > -math.inf
    return float((law.exp() * (law - other))[kept].sum())


@pytest.mark.parametrize("prior", ["sft", "baseline"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 3.0, "rollout_temperature": 0.7, "rollout_top_k": 20, "rollout_top_p": 0.9},
        {"min_new_tokens": 4, "eos_token_id": ENDS},
        {"strategy": "greedy"},
    ],
    ids=["plain", "truncated", "min-new-tokens", "greedy"],
)
def test_every_step_has_the_law_and_the_divergence_of_its_definition(
    options: dict[str, object], prior: str
) -> None:
    head = random_head(models()[prior])
    settings = {"alpha": 2.0, **options}
    result = run("value_guided", PROMPTS[:3], value=head, prior=prior, **settings)
    temperature = settings.get("rollout_temperature", 1.0)
    cuts = settings.get("rollout_top_k", zoo.VOCAB_SIZE), settings.get("rollout_top_p", 2.0)
    is_greedy = settings.get("strategy") == "greedy"
    for prompt, ids, trace, certificate in zip(
        PROMPTS, tokens(result), result.traces, result.certificates, strict=False
    ):
        total = 0.0
        for step, entry in enumerate(trace):
            context = [*prompt, *ids[:step]]
            logprobs, value, q = prior_and_q(models()[prior], head, context)
            allowed = logprobs.clone()
            if step < settings.get("min_new_tokens", 0):
                allowed[list(ENDS)] = -math.inf
                assert ids[step] not in ENDS
            allowed = allowed.log_softmax(-1)
            guided = (allowed + q / settings["alpha"]).log_softmax(-1)
            law = truncate(guided, temperature, *cuts)
            if is_greedy:
                assert ids[step] == int(guided.argmax())
                law = torch.full_like(guided, -math.inf)
                law[ids[step]] = 0.0
            assert float(entry.prior_logprobs) == pytest.approx(float(allowed[ids[step]]), abs=ATOL)
            assert float(entry.final_logprobs) == pytest.approx(float(law[ids[step]]), abs=3 * ATOL)
            assert float(entry.q) == pytest.approx(float(q[ids[step]]), abs=3 * ATOL)
            assert entry.value == pytest.approx(value, abs=3 * ATOL)
            sft = prior_and_q(models()["sft"], value_head(), context)[0]
            expected = divergence(law, sft)
            assert entry.kl_to_sft == pytest.approx(expected, abs=10 * ATOL)
            of_prior = entry.kl_to_sft if prior == "sft" else entry.kl_to_baseline
            assert of_prior == pytest.approx(divergence(law, logprobs), abs=10 * ATOL)
            total += expected
        assert certificate.kl_to_sft == pytest.approx(total, abs=50 * ATOL)
        assert certificate.prior == prior and certificate.kl_kind == "exact"
        assert (certificate.kl_to_baseline is None) == (prior == "sft")
        assert certificate.kl_bound is None


def test_a_head_without_directions_draws_what_the_prior_draws() -> None:
    head = random_head(models()["sft"])
    with torch.no_grad():
        head.token_embeddings.zero_()
    result = run("value_guided", value=head, eos_token_id=ENDS)
    assert tokens(result) == tokens(run("sft", eos_token_id=ENDS))
    assert all(one.kl_to_sft == pytest.approx(0.0, abs=ATOL) for one in result.certificates)


def test_guided_responses_follow_the_law_that_was_written_down() -> None:
    model, num = small_model(11), 600
    head = random_head(model)

    def policy(ids: list[int]) -> torch.Tensor:
        logprobs, _, q = prior_and_q(model, head, ids)
        return (logprobs + q / 1.5).log_softmax(-1)

    law, plain = small_law(policy), small_law(lambda ids: prior_and_q(model, head, ids)[0])
    result = presets.value_guided(
        [torch.tensor(START)] * num,
        sft=model,
        value=head,
        alpha=1.5,
        max_new_tokens=3,
        eos_token_id=END,
        batch_size=num,
    )
    drawn = [tuple(ids) for ids in tokens(result)]
    assert excess(drawn, law) < BOUND
    assert excess(drawn, plain) > BOUND
    # Exact divergences of the steps: their mean over responses is that of the responses' law.
    truth = sum(mass * math.log(mass / plain[text]) for text, mass in law.items())
    found = torch.tensor([one.kl_to_sft for one in result.certificates])
    assert float(found.mean()) == pytest.approx(truth, abs=4 * float(found.std()) / math.sqrt(num))


def test_a_reward_scores_the_response_and_changes_nothing() -> None:
    plain = run("value_guided", reward=None, eos_token_id=ENDS)
    scored = run("value_guided", eos_token_id=ENDS)
    assert tokens(plain) == tokens(scored)
    score = classifier_reward(models()["reward"])
    for prompt, ids, trace in zip(PROMPTS, tokens(scored), scored.traces, strict=True):
        assert trace[0].rewards.tolist() == [pytest.approx(score([[*prompt, *ids]]), abs=ATOL)]
    assert all(trace[0].rewards.shape == (1, 0) for trace in plain.traces)
    assert "reward" not in plain.stats.token_forwards


@pytest.mark.parametrize("source", [{"sft": None}, {"prior": "baseline"}], ids=str)
def test_the_best_of_n_guided_texts_is_certified_by_their_log_ratio(
    source: dict[str, object],
) -> None:
    head = random_head(models()["baseline"])
    result = run("best_of_n", n=3, source="value", value=head, alpha=2.0, **source)
    extra = math.log(3) - 2 / 3
    for prompt, ids, stages, one in zip(
        PROMPTS, tokens(result), result.stages, result.certificates, strict=True
    ):
        scores = classifier_reward(models()["reward"])(
            [[*prompt, *text] for text in stages[0].sequences]
        )
        assert ids == stages[0].sequences[scores.index(max(scores))]
        ratios = {"baseline": 0.0, "sft": 0.0}
        for step, token in enumerate(ids):
            context = [*prompt, *ids[:step]]
            logprobs, _, q = prior_and_q(models()["baseline"], head, context)
            guided = (logprobs + q / 2.0).log_softmax(-1)[token]
            sft = prior_and_q(models()["sft"], value_head(), context)[0]
            ratios["baseline"] += float(guided - logprobs[token])
            ratios["sft"] += float(guided - sft[token])
        assert one.kl_to_baseline == pytest.approx(extra + ratios["baseline"], abs=20 * ATOL)
        if "sft" in source:
            assert one.kl_to_sft is None
        else:
            assert one.kl_to_sft == pytest.approx(extra + ratios["sft"], abs=20 * ATOL)
        assert one.kl_kind == "at most"


def test_a_head_is_refused_beside_another_model_than_its_own() -> None:
    known = {"prior": prior_fingerprint(models()["sft"])}
    head = random_head(models()["sft"], models=known)
    run("value_guided", value=head, max_new_tokens=1)
    with pytest.raises(InvalidArgument, match="value belongs to another model than sft"):
        run("value_guided", value=head, sft=third_model())
    with pytest.raises(InvalidArgument, match="value belongs to another model than baseline"):
        run("value_guided", value=head, sft=None)
    with pytest.raises(InvalidArgument, match="value has vectors for 99 tokens, but sft has 150"):
        run("value_guided", value=random_head(models()["sft"], vocab_size=99))
    with pytest.raises(InvalidArgument, match=r"value reads states of 16 numbers.* of sft have 32"):
        run("value_guided", value=random_head(models()["sft"], hidden_size=16))
    with pytest.raises(InvalidArgument, match="value must be a ValueHead or a folder"):
        run("value_guided", value=3)


def test_a_model_in_bf16_takes_the_head_that_was_fitted_on_its_twin(tmp_path: Path) -> None:
    twin = copy.deepcopy(models()["sft"]).bfloat16()
    head = random_head(models()["sft"], models={"prior": prior_fingerprint(models()["sft"])})
    head.save(tmp_path)
    result = run("value_guided", PROMPTS[:2], sft=twin, value=tmp_path)
    for prompt, ids, trace in zip(PROMPTS, tokens(result), result.traces, strict=False):
        logprobs, value, _ = prior_and_q(twin, head, prompt)
        # bf16 has three digits, and the logits reach 15.
        assert float(trace[0].prior_logprobs) == pytest.approx(float(logprobs[ids[0]]), abs=0.2)
        assert trace[0].value == pytest.approx(value, abs=0.2)


def test_the_models_that_a_prior_names_are_needed() -> None:
    for prior, other in (("sft", "baseline"), ("baseline", "sft")):
        with pytest.raises(InvalidArgument, match=f"^{prior} is needed by the method"):
            run("value_guided", prior=prior, **{prior: None})
        head = random_head(models()[prior])
        with_both = run("value_guided", prior=prior, value=head)
        alone = run("value_guided", value=head, **{other: None})
        assert tokens(with_both) == tokens(alone)
    with pytest.raises(InvalidArgument, match="sft, or baseline, is needed"):
        run("value_guided", sft=None, baseline=None)
    with pytest.raises(InvalidArgument, match="value is needed by the method 'value_guided'"):
        presets.value_guided(PROMPTS, sft=models()["sft"], **SHORT)
