"""`tq_fast.decode` gives the tokens of the naive loop, on every architecture, in fp32."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.naive import (
    NaiveResponse,
    NaiveSettings,
    classifier_reward,
    decode_naively,
    next_token_logprobs,
)

# The longest prompt is three windows long; all prompts are in one forest.
PROMPT_LENGTHS = (3, 11, 20, 7)
SHORT = {"k": 4, "horizon": 5, "max_new_tokens": 5}
# One token in six ends a response, so that ends occur among candidates and inside of roll-outs.
ENDS = tuple(range(5, zoo.VOCAB_SIZE, 6))

# Both sides compute in fp32, in other orders of summation. Logits and rewards of the zoo reach 15,
# where one unit in the last place is 1e-6, and errors add up over a few layers: up to 1e-5 was
# seen. Neither a wrong mask nor a wrong position stays below 1e-2.
ATOL = 3e-5
# An arg max that hangs on less than the error is decided by chance: such a test would be void.
MARGIN = 10 * ATOL


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(zoo.VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@functools.cache
def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return baseline and reward of an architecture; a Llama scores where it has no classifier."""
    kind = name if zoo.has_classifier(name) else "llama"
    return zoo.language_model(name), zoo.classifier(kind)


def decode(
    given: Sequence[Sequence[int]],
    baseline: PreTrainedModel,
    reward: PreTrainedModel,
    *,
    batch_size: int = 8,
    **options: object,
) -> tq_fast.DecodeResult:
    """Run `tq_fast.decode` on token ids, everything greedy unless said otherwise."""
    options = {"strategy": "greedy", "rollout": "greedy", **SHORT, **options}
    tensors = [torch.tensor(ids) for ids in given]
    return tq_fast.decode(tensors, baseline, reward, batch_size=batch_size, **options)


def assert_same(
    result: tq_fast.DecodeResult, truth: Sequence[NaiveResponse], *, alpha: float = 1.0
) -> None:
    """Assert that tokens, candidates, priors and values are those of the naive loop."""
    assert [ids.tolist() for ids in result.sequences] == [naive.token_ids for naive in truth]
    for trace, naive in zip(result.traces, truth, strict=True):
        for ours, theirs in zip(trace, naive.steps, strict=True):
            assert ours.candidates.tolist() == theirs.candidates
            assert ours.choice == theirs.choice
            for mine, expected, atol in (
                (ours.prior_logprobs, theirs.prior_logprobs, ATOL),
                (ours.q, theirs.q, ATOL),
                (ours.final_logprobs, theirs.scores.log_softmax(-1), ATOL * (1 + 1 / alpha)),
            ):
                torch.testing.assert_close(mine.double(), expected, rtol=0, atol=atol)


def assert_decided(truth: Sequence[NaiveResponse]) -> None:
    steps = [step for naive in truth for step in naive.steps]
    assert min(step.margin for step in steps) > MARGIN


def assert_ends_occurred(truth: Sequence[NaiveResponse], ends: Sequence[int]) -> None:
    steps = [step for naive in truth for step in naive.steps]
    assert any(token in ends for step in steps for token in step.candidates)
    tails = [tail for step in steps for tails in step.rollouts for tail in tails]
    assert any(tail and tail[-1] in ends for tail in tails)
    assert any(len(tail) == SHORT["horizon"] and tail[-1] not in ends for tail in tails)


@pytest.mark.parametrize("name", zoo.LANGUAGE_MODELS)
@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
def test_every_architecture_gives_the_tokens_of_the_naive_loop(
    name: str, ends: tuple[int, ...]
) -> None:
    baseline, reward = models(name)
    settings = NaiveSettings(eos_token_id=ends, **SHORT)
    score = classifier_reward(reward)
    truth = [decode_naively(ids, baseline, score, settings=settings) for ids in prompts()]
    assert_decided(truth)
    if ends:
        assert_ends_occurred(truth, ends)

    assert_same(decode(prompts(), baseline, reward, eos_token_id=ends), truth)
    if ends:
        # Decode more prompts than a forest has trees, and each prompt alone.
        options = {"eos_token_id": ends}
        assert_same(decode(prompts(), baseline, reward, batch_size=3, **options), truth)
        for ids, alone in zip(prompts(), truth, strict=True):
            assert_same(decode([ids], baseline, reward, **options), [alone])


@pytest.mark.parametrize(
    "options",
    [
        {"horizon": 0},
        {"horizon": None},
        {"horizon": None, "max_new_tokens": 1},
        {"k": 1},
        {"k": 20, "horizon": 2},
        {"alpha": 0.05},
        {"alpha": 20.0},
        {"prior": "sft"},
        {"prior": "baseline"},
        {"prior": "sft", "candidates_from": "sft"},
        {"prior": "baseline", "candidates_from": "sft"},
        {"prior": "sft", "candidates_from": "sft", "horizon": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
def test_every_setting_gives_the_tokens_of_the_naive_loop(
    options: dict[str, object], ends: tuple[int, ...]
) -> None:
    baseline, reward = models("llama")
    sft = zoo.language_model("llama", seed=5)
    settings = NaiveSettings(**{**SHORT, "eos_token_id": ends, "prior": "sft", **options})
    score = classifier_reward(reward)
    truth = [decode_naively(ids, baseline, score, sft=sft, settings=settings) for ids in prompts()]
    if settings.k > 1:
        assert_decided(truth)
    result = decode(prompts(), baseline, reward, sft=sft, eos_token_id=ends, **options)
    assert_same(result, truth, alpha=settings.alpha)


def test_a_prior_of_another_architecture_gives_the_tokens_of_the_naive_loop() -> None:
    baseline, reward = models("mistral-sliding")[0], models("gpt2")[1]
    sft = zoo.language_model("gemma2")
    settings = NaiveSettings(**SHORT, eos_token_id=ENDS, prior="sft")
    score = classifier_reward(reward)
    truth = [decode_naively(ids, baseline, score, sft=sft, settings=settings) for ids in prompts()]
    assert_decided(truth)
    assert_same(decode(prompts(), baseline, reward, sft=sft, eos_token_id=ENDS), truth)


@pytest.mark.parametrize("horizon", [0, 5])
def test_a_reward_whose_padding_token_is_drawn_pools_as_transformers_does(horizon: int) -> None:
    """transformers reads the score at the last token that is not padding, wherever that is."""
    baseline, _ = models("llama")
    pad = ENDS[0]
    reward = zoo.classifier("llama", pad_token_id=pad)
    # Some prompts end with the padding token, which occurs in candidates and roll-outs as well.
    given = [[*prompts()[1], pad], [*prompts()[2], pad, pad], prompts()[3]]
    score = classifier_reward(reward)
    settings = NaiveSettings(**{**SHORT, "horizon": horizon}, eos_token_id=(pad,))
    baseline_likes_pad = raise_logit(baseline, pad, by=6.0)
    truth = [decode_naively(ids, baseline_likes_pad, score, settings=settings) for ids in given]
    assert_decided(truth)
    ending = [token == pad for naive in truth for s in naive.steps for token in s.candidates]
    assert any(ending)
    options = {"horizon": horizon, "eos_token_id": (pad,)}
    assert_same(decode(given, baseline_likes_pad, reward, **options), truth)


def raise_logit(model: PreTrainedModel, token: int, *, by: float) -> PreTrainedModel:
    """Return a copy of `model` with a bias on the logit of `token`."""
    copy = zoo.language_model("llama")
    copy.load_state_dict(model.state_dict())
    head = torch.nn.Linear(copy.lm_head.in_features, copy.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(copy.lm_head.weight)
        head.bias.zero_()
        head.bias[token] = by
    copy.lm_head = head
    return copy.eval()


@pytest.mark.parametrize("label", [0, 2])
def test_the_label_that_is_asked_for_is_the_reward(label: int) -> None:
    baseline, _ = models("llama")
    reward = zoo.classifier("llama", num_labels=3)
    settings = NaiveSettings(**SHORT)
    score = classifier_reward(reward, label)
    truth = [decode_naively(ids, baseline, score, settings=settings) for ids in prompts()]
    result = decode(prompts(), baseline, reward, reward_index=label, eos_token_id=())
    assert_same(result, truth)


def test_a_function_as_reward_gives_the_tokens_of_the_naive_loop() -> None:
    baseline, _ = models("llama")

    def score(whole: list[list[int]]) -> list[float]:
        return [sum(token % 7 for token in ids) / len(ids) for ids in whole]

    def reward(given: list[list[int]], responses: list[list[int]]) -> list[float]:
        return score([[*p, *r] for p, r in zip(given, responses, strict=True)])

    settings = NaiveSettings(**SHORT, eos_token_id=ENDS)
    truth = [decode_naively(ids, baseline, score, settings=settings) for ids in prompts()]
    assert_decided(truth)
    assert_same(decode(prompts(), baseline, reward, eos_token_id=ENDS), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["llama", "mistral-sliding", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox"]
)
def test_half_precision_runs_and_starts_as_near_the_truth_as_the_plain_model(
    name: str, dtype: torch.dtype
) -> None:
    baseline = zoo.language_model(name, dtype=dtype)
    reward = zoo.classifier(name, dtype=dtype)
    result = decode(prompts(), baseline, reward, eos_token_id=ENDS)
    steps = [step for trace in result.traces for step in trace]
    assert all(step.q.isfinite().all() and step.final_logprobs.isfinite().all() for step in steps)

    exact = zoo.language_model(name, dtype=dtype).float()
    errors, plain_errors = [], []
    for ids, trace in zip(prompts(), result.traces, strict=True):
        truth = next_token_logprobs(exact, ids)[trace[0].candidates]
        plain = next_token_logprobs(baseline, ids)[trace[0].candidates]
        errors.append((trace[0].prior_logprobs - truth).abs())
        plain_errors.append((plain - truth).abs())
    # The plain model's error is rounding too. With so few numbers ours may be somewhat larger.
    assert torch.cat(errors).median() <= 2 * torch.cat(plain_errors).median() + 0.002


def test_what_is_returned_can_be_trained_on() -> None:
    baseline, reward = models("llama")
    result = decode(prompts()[:1], baseline, reward, eos_token_id=())
    # A tensor made in inference mode raises here: embedding keeps its ids for the backward pass.
    baseline(input_ids=result.sequences[0][None]).logits.sum().backward()
    rows = torch.randn(zoo.VOCAB_SIZE, requires_grad=True)
    (rows[result.traces[0][0].candidates] * result.traces[0][0].final_logprobs).sum().backward()
    assert rows.grad is not None
    baseline.zero_grad()


@pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("rollout", ["greedy", "sample"])
@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_the_references_alone_give_the_same_tokens_as_the_kernels(
    name: str, rollout: str, strategy: str
) -> None:
    baseline, reward = models(name)
    options = {
        "rollout": rollout,
        "strategy": strategy,
        "num_rollouts": 2,
        "rollout_temperature": 0.8,
        "rollout_top_p": 0.9,
        "eos_token_id": ENDS,
        "seed": 3,
    }
    fast = decode(prompts(), baseline, reward, **options)
    plain = decode(prompts(), baseline, reward, backend="ref", **options)
    for ours, theirs in zip(fast.traces, plain.traces, strict=True):
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.candidates.tolist() == reference.candidates.tolist()
            assert mine.token_id == reference.token_id
            torch.testing.assert_close(mine.q, reference.q, rtol=0, atol=ATOL)
