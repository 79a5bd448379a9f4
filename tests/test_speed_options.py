"""Every speed option keeps its promise: the same tokens with it as without it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tq_fast.config import SpeedOptions
from tq_fast.errors import InvalidArgument, RewardError
from tq_fast.forest.language import LanguageForest

VOCAB = 40
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 6, 7], [14, 15]]
ENDS = (0, 11, 22)
NONE = SpeedOptions(**{field.name: False for field in dataclasses.fields(SpeedOptions)})
ARCHITECTURES = ["llama", "mistral-sliding", "gemma3", "gpt2"]

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


def language_model(name: str = "llama", seed: int = 1, scale: float = 1.0) -> PreTrainedModel:
    model = zoo.language_model(name, seed=seed, vocab_size=VOCAB)
    with torch.no_grad():
        model.get_output_embeddings().weight *= scale
    return model


def share_of_low(prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
    """Return a number between 0 and 1 for each response, different for nearly every one."""
    return [
        sum((token * (rollout_id + 3)) % 17 for rollout_id, token in enumerate(response))
        / (17 * max(1, len(response)))
        for response in responses
    ]


def run(
    baseline: PreTrainedModel,
    speed: SpeedOptions,
    reward: Callable[..., Any] = share_of_low,
    **options: Any,
) -> tq_fast.DecodeResult:
    settings = {"k": 5, "horizon": 4, "max_new_tokens": 7, "alpha": 0.3, "eos_token_id": ENDS}
    prompts = options.pop("prompts", PROMPTS)
    return tq_fast.decode(prompts, baseline, reward, speed=speed, **{**settings, **options})


def assert_same(ours: tq_fast.DecodeResult, plain: tq_fast.DecodeResult) -> None:
    assert [ids.tolist() for ids in ours.sequences] == [ids.tolist() for ids in plain.sequences]
    for trace, other in zip(ours.traces, plain.traces, strict=True):
        for step, truth in zip(trace, other, strict=True):
            assert torch.equal(step.candidates, truth.candidates)
            known = ~step.q.isnan()
            torch.testing.assert_close(step.q[known], truth.q[known], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("horizon", [4, None])
@pytest.mark.parametrize("ends", [ENDS, ()])
def test_equal_rollouts_share_rows_until_they_part(
    architecture: str, horizon: int | None, ends: tuple[int, ...]
) -> None:
    # The baseline is sharp enough for roll-outs to stay equal for a while.
    baseline = language_model(architecture, scale=3.0)
    options = {"num_rollouts": 6, "horizon": horizon, "eos_token_id": ends}
    plain = run(baseline, NONE, **options)
    ours = run(baseline, dataclasses.replace(NONE, merge_equal=True), **options)
    assert_same(ours, plain)
    saved = ours.stats.token_forwards["baseline"] / plain.stats.token_forwards["baseline"]
    assert saved < 0.8
    assert ours.stats.rollouts_run == plain.stats.rollouts_run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("horizon", [1, 2, 4, None])
@pytest.mark.parametrize("ends", [ENDS, ()])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_greedy_rollout_of_the_chosen_token_serves_again(
    architecture: str, horizon: int | None, ends: tuple[int, ...], batch_size: int
) -> None:
    baseline = language_model(architecture)
    options = {"rollout": "greedy", "horizon": horizon, "eos_token_id": ends, "alpha": 5.0}
    options |= {"strategy": "greedy", "batch_size": batch_size, "max_new_tokens": 9}
    plain = run(baseline, NONE, **options)
    ours = run(baseline, dataclasses.replace(NONE, reuse_greedy=True), **options)
    assert_same(ours, plain)
    ran, before = (r.stats.token_forwards["baseline"] for r in (ours, plain))
    if horizon == 1:
        assert ran == before
    else:
        assert ran < before or (horizon == 2 and ran == before)


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
@pytest.mark.parametrize("estimator", ["mean", "soft"])
@pytest.mark.parametrize("alpha", [0.02, 0.3, 3.0])
def test_the_lazy_argmax_chooses_as_full_evaluation_does(
    strategy: str, estimator: str, alpha: float
) -> None:
    baseline = language_model(scale=2.0)
    options = {"num_rollouts": 4, "strategy": strategy, "estimator": estimator, "alpha": alpha}
    plain = run(baseline, NONE, reward_bounds=(0.0, 1.0), **options)
    lazy = dataclasses.replace(NONE, lazy_argmax=True)
    ours = run(baseline, lazy, reward_bounds=(0.0, 1.0), **options)
    assert_same(ours, plain)
    possible = plain.stats.rollouts_run + plain.stats.rollouts_skipped
    assert ours.stats.rollouts_run + ours.stats.rollouts_skipped == possible
    steps = [step for trace in ours.traces for step in trace]
    # At a small alpha the soft value may be the greatest reward while any reward is missing.
    if estimator == "mean" or alpha > 0.1:
        assert ours.stats.rollouts_run < plain.stats.rollouts_run
        assert any(not step.is_complete for step in steps)
    truths = [step for trace in plain.traces for step in trace]
    for step, truth in zip(steps, truths, strict=True):
        # The divergence is an upper bound where a Q is missing, and exact where none is.
        assert step.kl_to_baseline >= truth.kl_to_baseline - 1e-5
        if step.is_complete:
            assert step.kl_to_baseline == pytest.approx(truth.kl_to_baseline, abs=1e-5)
            assert torch.allclose(step.final_logprobs, truth.final_logprobs, atol=1e-5)
        else:
            assert step.final_logprobs.isnan().all()


@pytest.mark.parametrize("weights", ["log_ratio", "reward_gap"])
def test_the_lazy_argmax_keeps_the_tokens_of_indirect_transfer(weights: str) -> None:
    def other(prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
        return [float(sum(response) % 5) / 5 for response in responses]

    options = {
        "sft": language_model(seed=2),
        "baseline_reward": other,
        "transfer": "indirect",
        "weights": weights,
        "beta": 0.7,
        "num_rollouts": 3,
        "reward_bounds": (0.0, 1.0),
        "alpha": 2.0,
    }
    baseline = language_model(scale=3.0)
    plain = run(baseline, NONE, **options)
    ours = run(baseline, SpeedOptions(), **options)
    assert_same(ours, plain)
    assert ours.stats.rollouts_run < plain.stats.rollouts_run


@pytest.mark.parametrize("rollout", ["greedy", "sample"])
def test_all_levers_together_give_the_tokens_of_none(rollout: str) -> None:
    baseline = language_model(scale=2.0)
    options = {"rollout": rollout, "num_rollouts": 3, "horizon": None, "batch_size": 2}
    plain = run(baseline, NONE, **options)
    assert_same(run(baseline, SpeedOptions(), **options), plain)
    bounded = run(baseline, SpeedOptions(), reward_bounds=(0.0, 1.0), **options)
    assert_same(bounded, plain)


def test_a_text_is_scored_once() -> None:
    seen: list[tuple[int, ...]] = []

    def reward(prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
        texts = [(*prompt, -1, *text) for prompt, text in zip(prompts, responses, strict=True)]
        assert len(set(texts)) == len(texts)
        seen.extend(texts)
        return share_of_low(prompts, responses)

    options = {"num_rollouts": 6, "horizon": None, "max_new_tokens": 5, "prompts": PROMPTS[:3]}
    baseline = language_model(scale=4.0)
    ours = run(baseline, SpeedOptions(), reward, **options)
    assert_same(ours, run(baseline, NONE, **options))
    assert len(seen) < ours.stats.rollouts_run


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_a_free_slot_goes_to_the_next_prompt(strategy: str) -> None:
    baseline = language_model()
    options = {"strategy": strategy, "batch_size": 2, "max_new_tokens": 9, "num_rollouts": 2}
    order: list[int] = []
    decoder = tq_fast.TransferDecoder(baseline, share_of_low)
    result = decoder.decode(
        PROMPTS,
        k=5,
        horizon=3,
        eos_token_id=tuple(range(0, VOCAB, 4)),
        on_finished=lambda idx, _: order.append(idx),
        **options,
    )
    assert sorted(order) == list(range(len(PROMPTS)))
    alone = tq_fast.TransferDecoder(baseline, share_of_low, speed=NONE)
    plain = alone.decode(PROMPTS, k=5, horizon=3, eos_token_id=tuple(range(0, VOCAB, 4)), **options)
    assert_same(result, plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_prompts_have_in_common_is_encoded_once(architecture: str) -> None:
    common = [1 + i * 7 % (VOCAB - 1) for i in range(20)]
    prompts = [
        [*common, 3, 4, 5],
        [9],
        [*common, 3, 4, 7],
        common,
        [*common, 3, 4, 5],
        [*common[:9]],
    ]
    baseline = language_model(architecture)
    options = {"prompts": prompts, "sft": language_model(architecture, seed=2)}
    reward = zoo.classifier("llama", vocab_size=VOCAB)
    plain = run(baseline, NONE, reward, **options)
    ours = run(baseline, dataclasses.replace(NONE, share_prefixes=True), reward, **options)
    assert_same(ours, plain)
    # The baseline need not encode 22 tokens of the third prompt, 19 of the fourth, and the fifth.
    saved = plain.stats.token_forwards["baseline"] - ours.stats.token_forwards["baseline"]
    assert saved == 22 + 19 + 23
    # A prompt that takes a free slot later shares the prefixes that are in the forest then.
    queued = run(baseline, SpeedOptions(), reward, batch_size=1, **options)
    assert_same(queued, plain)


def test_bounds_that_do_not_hold_are_an_error() -> None:
    with pytest.raises(RewardError, match=r"prompt 0, step 0: .*outside of its reward_bounds"):
        run(language_model(), SpeedOptions(), reward_bounds=(0.0, 0.01), alpha=1e-3)


@pytest.mark.parametrize("share", [1.0, 0.4, 0.1])
def test_a_memory_budget_is_kept_with_the_same_tokens(share: float) -> None:
    baseline, sft = language_model(), language_model(seed=3)
    reward = zoo.classifier("llama", vocab_size=VOCAB)
    options = {"sft": sft, "num_rollouts": 2, "horizon": 6}
    free = run(baseline, SpeedOptions(), reward, **options)
    held = sum(free.stats.peak_kv_bytes.values())
    # Logits are counted too, so that the whole does not quite fit.
    budget = int(share * held)
    ours = run(baseline, SpeedOptions(), reward, memory_budget=budget, **options)
    assert_same(ours, free)
    assert sum(ours.stats.peak_kv_bytes.values()) <= budget


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"memory_budget must be at least \d+ bytes"):
        run(language_model(), SpeedOptions(), memory_budget=1000)
    with pytest.raises(InvalidArgument, match="memory_budget must be a number of bytes"):
        run(language_model(), SpeedOptions(), memory_budget=0)


def test_out_of_memory_halves_the_forest_and_goes_on() -> None:
    rows: list[int] = []

    def short(prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
        rows.append(len(responses))
        if len(responses) > 3:
            raise torch.OutOfMemoryError("no memory")
        return share_of_low(prompts, responses)

    baseline = language_model()
    with pytest.warns(UserWarning, match="out of memory with 5 prompts and 25 roll-outs"):
        ours = run(baseline, SpeedOptions(), short)
    assert min(rows) <= 3 and max(rows) > 3
    assert_same(ours, run(baseline, NONE))


def test_out_of_memory_with_a_single_rollout_is_raised() -> None:
    def never(prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
        raise torch.OutOfMemoryError("no memory")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            run(language_model(), SpeedOptions(), never)


def test_out_of_memory_in_a_refilled_slot_loses_no_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baseline = language_model()
    plain = run(baseline, NONE)
    prefill, calls = LanguageForest.prefill, []

    def short(forest: LanguageForest, tree: int, token_ids: Sequence[int]) -> None:
        calls.append(tree)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        prefill(forest, tree, token_ids)

    monkeypatch.setattr(LanguageForest, "prefill", short)
    with pytest.warns(UserWarning, match="out of memory with 2 prompts"):
        assert_same(run(baseline, SpeedOptions(), batch_size=2), plain)
    assert len(calls) > 3
