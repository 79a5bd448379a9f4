"""`decode` and `TransferDecoder`: bad input, options, packing, what a result holds."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import tq_fast
from tests import zoo
from tq_fast.config import SpeedOptions
from tq_fast.errors import DecodingError, InvalidArgument, RewardError, UnsupportedModel

VOCAB = 40


def llama(kind: type = LlamaForCausalLM, seed: int = 0, **options: object):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.pop("vocab_size", VOCAB),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return kind(config).eval()


@pytest.fixture(scope="module")
def baseline() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def sft() -> LlamaForCausalLM:
    return llama(seed=1)


def count_evens(prompts: list, responses: list) -> list[float]:
    return [sum(token % 2 == 0 for token in response) / 4 for response in responses]


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
SHORT = {"k": 4, "horizon": 3, "max_new_tokens": 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": VOCAB + 1}, "k must be at most the vocabulary, 40, got 41"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"horizon": -2}, "horizon"),
        ({"num_rolouts": 2}, "did you mean 'num_rollouts'"),
        ({"eos_token_id": VOCAB}, "eos_token_id must be inside of the vocabulary"),
        ({"prior": "sft"}, "prior='sft' needs an sft model"),
        ({"candidates_from": "sft"}, "candidates_from='sft' needs an sft model"),
        ({"transfer": "indirect", "beta": 1.0}, "weights='log_ratio' needs an sft model"),
        (
            {"transfer": "indirect", "beta": 1.0, "weights": "reward_gap"},
            "weights='reward_gap' needs baseline_reward",
        ),
        ({"max_new_tokens": 60}, "that makes 83, but the baseline model allows 64"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"reward_bounds": (1, 0)}, "reward_bounds must have lo < hi"),
        ({"reward_bounds": 3}, "reward_bounds must be a pair"),
        ({"reward_index": 1}, "reward is a function, which takes no tokenizer"),
    ],
)
def test_bad_options_are_refused_before_any_forward_pass(options, message) -> None:
    def reward(prompts, responses):
        raise AssertionError("work began")

    model = llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(InvalidArgument, match=message.replace("(", r"\(")):
        tq_fast.decode([5, 6, 7], model, reward, **options)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"baseline": "./no/such/folder"}, "baseline='./no/such/folder': there is no such folder"),
        ({"baseline": 3}, "baseline must be a hub id, a folder or a model"),
        ({"reward": 3}, "reward must be a hub id, a folder, a sequence classifier or a function"),
        ({"reward": "/no/such/reward"}, "reward='/no/such/reward': there is no such folder"),
        ({"sft": llama(vocab_size=50)}, "same vocabulary, got sizes 50 and 40"),
        ({"reward": llama()}, "reward must be a sequence classifier, got LlamaForCausalLM"),
        (
            {"reward": llama(LlamaForSequenceClassification, num_labels=3)},
            "3 labels; reward_index must say which",
        ),
        (
            {
                "reward": llama(LlamaForSequenceClassification, num_labels=3),
                "reward_index": 3,
            },
            r"reward_index must be in \[0, 3\)",
        ),
        (
            {"reward": llama(LlamaForSequenceClassification, num_labels=1, vocab_size=50)},
            "vocabulary of 50, the baseline one of 40",
        ),
        ({"tokenizer": 3}, "tokenizer must be a hub id, a folder or a tokenizer"),
    ],
)
def test_bad_models_are_refused_by_name(baseline, models, message) -> None:
    arguments = {"baseline": baseline, "reward": count_evens, **models}
    with pytest.raises(InvalidArgument, match=message):
        tq_fast.TransferDecoder(**arguments)


def test_a_missing_folder_beside_others_is_not_looked_for_on_the_hub(tmp_path, monkeypatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match="baseline='models/nope': there is no such folder"):
        tq_fast.TransferDecoder("models/nope", count_evens)


def test_a_classifier_is_no_baseline() -> None:
    classifier = llama(LlamaForSequenceClassification, num_labels=1)
    with pytest.raises((InvalidArgument, UnsupportedModel), match="baseline"):
        tq_fast.TransferDecoder(classifier, count_evens)


def test_a_result_holds_one_entry_a_prompt(baseline, sft) -> None:
    result = tq_fast.decode(
        PROMPTS,
        baseline,
        count_evens,
        sft=sft,
        num_rollouts=2,
        reward_bounds=(0.0, 5.0),
        speed=SpeedOptions(lazy_argmax=False),
        eos_token_id=(),
        **SHORT,
    )
    assert result.texts is None
    assert [sequence.shape for sequence in result.sequences] == [(6,)] * 3
    for sequence, trace, certificate in zip(
        result.sequences, result.traces, result.certificates, strict=True
    ):
        assert [step.token_id for step in trace] == sequence.tolist()
        for step in trace:
            assert step.candidates.shape == step.q.shape == step.final_logprobs.shape == (4,)
            assert step.rewards.shape == (4, 2)
            assert torch.allclose(step.q, step.rewards.mean(1))
            assert step.final_logprobs.exp().sum().item() == pytest.approx(1, abs=1e-6)
            expected = (step.prior_logprobs + step.q / 1.0).log_softmax(-1)
            assert torch.allclose(step.final_logprobs, expected, atol=1e-6)
            assert 0 < step.prior_mass <= 1
        assert certificate.prior == "sft"
        total = sum(step.kl_to_sft for step in trace)
        assert certificate.kl_to_sft == pytest.approx(total)
        # The theorem bounds the sum of the divergences by T r_max / alpha - log mass.
        assert certificate.kl_bound == pytest.approx(6 * 5 - certificate.log_prior_mass)
        assert certificate.kl_to_sft <= certificate.kl_bound
    stats = result.stats
    assert stats.num_steps == 18
    assert stats.rollouts_run == 18 * 4 * 2
    assert stats.rollouts_skipped == 0
    assert stats.rollout_steps == 6 * 3
    # The two roll-outs of a candidate share its own token and the tokens that they draw alike.
    assert 9 + 3 * 6 * 4 * 5 >= stats.token_forwards["baseline"] > 9 + 3 * 6 * 4 * 4
    assert stats.token_forwards["sft"] == 9 + 3 * 5
    assert set(stats.seconds) == {
        "prefill",
        "candidates",
        "rollout",
        "reward",
        "reweight",
        "commit",
    }


@pytest.mark.parametrize("strategy", ["sample", "greedy"])
@pytest.mark.parametrize("rollout", ["sample", "greedy"])
def test_a_prompt_decodes_alone_as_it_does_among_others(baseline, strategy, rollout) -> None:
    options = {"strategy": strategy, "rollout": rollout, "num_rollouts": 2, "seed": 3, **SHORT}
    decoder = tq_fast.TransferDecoder(baseline, count_evens)
    together = decoder.decode(PROMPTS, **options)
    split = decoder.decode(PROMPTS, batch_size=2, **options)
    for idx, prompt in enumerate(PROMPTS):
        alone = decoder.decode(prompt, **options)
        assert torch.equal(alone.sequences[0], together.sequences[idx])
        assert torch.equal(split.sequences[idx], together.sequences[idx])


def test_the_seed_decides(baseline) -> None:
    def run(seed: int) -> list[list[int]]:
        result = tq_fast.decode(PROMPTS, baseline, count_evens, alpha=5.0, seed=seed, **SHORT)
        return [sequence.tolist() for sequence in result.sequences]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert run(-(2**63)) != run(0)


def test_equal_prompts_get_different_responses(baseline) -> None:
    result = tq_fast.decode([[5, 6]] * 6, baseline, count_evens, alpha=5.0, **SHORT)
    assert len({tuple(sequence.tolist()) for sequence in result.sequences}) > 1


def test_no_prompts_make_an_empty_result(baseline) -> None:
    result = tq_fast.decode([], baseline, count_evens)
    assert result.sequences == [] and result.traces == [] and result.stats.num_steps == 0


def test_a_response_ends_with_its_eos_token(baseline) -> None:
    eos = tuple(range(2, VOCAB, 3))
    result = tq_fast.decode(PROMPTS, baseline, count_evens, eos_token_id=eos, **SHORT)
    lengths = {len(sequence) for sequence in result.sequences}
    assert min(lengths) < 6
    for sequence in result.sequences:
        assert not set(sequence[:-1].tolist()) & set(eos)
    assert result.stats.rollouts_skipped > 0


def test_with_horizon_zero_the_partial_text_is_scored(baseline) -> None:
    seen: list[int] = []

    def reward(prompts: list, responses: list) -> list[float]:
        seen.extend(map(len, responses))
        return [0.0] * len(responses)

    result = tq_fast.decode(
        [5, 6], baseline, reward, k=3, horizon=0, max_new_tokens=3, eos_token_id=()
    )
    assert seen == [1] * 3 + [2] * 3 + [3] * 3
    assert result.stats.rollout_steps == result.stats.rollouts_run == 0


def test_without_a_horizon_whole_responses_are_scored(baseline) -> None:
    lengths: set[int] = set()

    def reward(prompts: list, responses: list) -> list[float]:
        lengths.update(map(len, responses))
        return [0.0] * len(responses)

    tq_fast.decode(PROMPTS, baseline, reward, k=3, horizon=None, max_new_tokens=4, eos_token_id=())
    assert lengths == {4}


def test_a_small_alpha_follows_the_reward_and_a_large_one_the_prior(baseline) -> None:
    def mean(alpha: float) -> float:
        result = tq_fast.decode(
            [[5, 6, 7]] * 8, baseline, count_evens, alpha=alpha, eos_token_id=(), **SHORT
        )
        return sum(count_evens([], [s.tolist() for s in result.sequences])) / 8

    assert mean(0.02) > mean(50.0) + 0.2


def test_a_nan_reward_names_prompt_and_step_and_keeps_what_is_finished(baseline) -> None:
    calls = 0

    def reward(prompts: list, responses: list) -> list[float]:
        nonlocal calls
        calls += 1
        poison = calls > 8
        return [math.nan if poison and prompt == [8, 9, 10] else 0.0 for prompt in prompts]

    prompts = [[5, 6], [7, 8], [8, 9, 10]]
    with pytest.raises(RewardError, match=r"prompt 2, step 2: the reward returned nan") as caught:
        tq_fast.decode(prompts, baseline, reward, batch_size=2, eos_token_id=(), **SHORT)
    assert caught.value.prompt_idx == 2
    assert caught.value.step == 2
    assert sorted(caught.value.finished) == [0, 1]
    assert len(caught.value.finished[0]) == 6


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError, ZeroDivisionError])
def test_whatever_ends_a_call_carries_what_is_finished(baseline, kind, batch_size) -> None:
    prompts = [[5, 6], [7, 8], [8, 9, 10]]
    whole = tq_fast.decode(prompts, baseline, count_evens, eos_token_id=(), **SHORT)

    def stop(idx: int) -> None:
        if idx == 2:
            raise kind("stop")

    decoder = tq_fast.TransferDecoder(baseline, count_evens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind) as caught:
            decoder.decode(prompts, on_token=stop, batch_size=batch_size, eos_token_id=(), **SHORT)
    assert sorted(caught.value.finished) == [0, 1]
    for idx, sequence in caught.value.finished.items():
        assert torch.equal(sequence, whole.sequences[idx])


def test_an_error_comes_through_another_process_whole() -> None:
    error = RewardError("no luck", prompt_idx=1, step=2)
    error.finished = {0: torch.tensor([3, 4])}
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is RewardError and str(again) == str(error)
        assert (again.reason, again.prompt_idx, again.step) == ("no luck", 1, 2)
        assert again.finished[0].tolist() == [3, 4]


def test_threads_that_share_a_model_take_turns(baseline) -> None:
    decoder = tq_fast.TransferDecoder(baseline, count_evens)
    whole = decoder.decode(PROMPTS, eos_token_id=(), **SHORT)
    baseline.train()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(decoder.decode, PROMPTS, eos_token_id=(), **SHORT) for _ in range(3)]
        results = [call.result() for call in calls]
    assert baseline.training
    baseline.eval()
    for result in results:
        assert all(map(torch.equal, result.sequences, whole.sequences))


@pytest.mark.parametrize("score", [1e300, -1e39, math.inf])
def test_a_reward_that_fp32_cannot_hold_is_an_error(baseline, score: float) -> None:
    with pytest.raises(RewardError, match="step 0: the reward returned"):
        tq_fast.decode([5], baseline, lambda prompts, responses: [score] * len(prompts), **SHORT)


def test_a_reward_with_the_wrong_count_is_an_error(baseline) -> None:
    with pytest.raises(RewardError, match="step 0: the reward returned 1 scores for 4 responses"):
        tq_fast.decode([5], baseline, lambda prompts, responses: [0.0], **SHORT)


def test_what_a_reward_raises_is_kept_as_the_cause(baseline) -> None:
    def reward(prompts: list, responses: list) -> list[float]:
        raise KeyError("no such key")

    with pytest.raises(RewardError, match="no such key") as caught:
        tq_fast.decode([5], baseline, reward, **SHORT)
    assert isinstance(caught.value.__cause__, KeyError)


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[:] = math.nan
    with pytest.raises(DecodingError, match="prompt 0, step 0: the logits"):
        tq_fast.decode([5], broken, count_evens, **SHORT)


def test_noise_beyond_alpha_is_warned_of_once(baseline) -> None:
    def noisy(prompts: list, responses: list) -> list[float]:
        return [float(hash(tuple(response)) % 100) for response in responses]

    with pytest.warns(UserWarning, match="standard error of Q exceeds alpha") as caught:
        tq_fast.decode(PROMPTS, baseline, noisy, num_rollouts=2, alpha=0.1, **SHORT)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tq_fast.decode(PROMPTS, baseline, noisy, num_rollouts=1, alpha=0.1, **SHORT)


def test_the_users_model_is_left_as_it_was(baseline) -> None:
    before = baseline.config._attn_implementation
    weights = {name: value.clone() for name, value in baseline.state_dict().items()}
    tq_fast.decode([5, 6], baseline, count_evens, **SHORT)
    assert baseline.config._attn_implementation == before
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_model_in_training_mode_is_evaluated_and_left_in_training_mode() -> None:
    training = llama(attention_dropout=0.5).train()
    training.model.norm.eval()
    result = tq_fast.decode([5, 6], training, count_evens, **SHORT)
    again = tq_fast.decode([5, 6], training, count_evens, **SHORT)
    assert torch.equal(result.sequences[0], again.sequences[0])
    assert training.training and training.lm_head.training and not training.model.norm.training


@pytest.mark.parametrize("weights", ["log_ratio", "reward_gap", "published"])
def test_indirect_transfer_of_equal_rewards_is_direct_transfer(baseline, sft, weights) -> None:
    """With r = r_BL, and pi_sft = q for the log-ratio, all weights of a candidate are equal."""
    constant = [0.5]

    def reward(prompts: list, responses: list) -> list[float]:
        return constant * len(responses)

    options = {"num_rollouts": 3, "eos_token_id": (), "strategy": "greedy", **SHORT}
    result = tq_fast.decode(
        PROMPTS,
        baseline,
        reward,
        sft=baseline,
        baseline_reward=reward,
        transfer="indirect",
        weights=weights,
        beta=0.5,
        **options,
    )
    for trace in result.traces:
        for step in trace:
            assert torch.allclose(step.q, torch.full_like(step.q, 0.5), atol=1e-4)
            if weights != "published":
                assert torch.allclose(step.ess, torch.full_like(step.ess, 3.0), atol=1e-3)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: _default_dtype(torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        torch.inference_mode,
    ],
    ids=["default dtype", "autocast", "default device", "inference mode"],
)
@pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")
def test_the_callers_settings_of_torch_change_nothing(setting: Any) -> None:
    model, sft = zoo.language_model("llama"), zoo.language_model("llama", seed=5)
    scorer = zoo.classifier("llama")

    def fine(prompts: list[Any], responses: list[Any]) -> list[float]:
        """Scores that differ in the third decimal around 100: bf16 cannot tell them apart."""
        return [100 + sum(ids) % 97 / 1000 for ids in responses]

    options: dict[str, Any] = {
        "k": 4,
        "horizon": 3,
        "max_new_tokens": 4,
        "alpha": 0.005,
        "sft": sft,
    }
    for reward in (fine, scorer):
        expected = tq_fast.decode([3, 1, 4], model, reward, **options)
        with setting():
            result = tq_fast.decode([3, 1, 4], model, reward, **options)
        assert result.sequences[0].tolist() == expected.sequences[0].tolist()
        for ours, theirs in zip(result.traces[0], expected.traces[0], strict=True):
            assert ours.q.dtype == torch.float32 and torch.equal(ours.q, theirs.q)
