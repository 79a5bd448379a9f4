"""SmolLM2-135M-Instruct through the forest: the tokens of transformers and of the naive loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tq_fast
from tests.naive import NaiveSettings, classifier_reward, decode_naively
from tests.real.conftest import QUESTIONS, chats
from tq_fast.forest.cpu_layers import describe_layers

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")

# Logits of this model reach 30; in fp32, the two orders of summation differ by 1e-4 at most.
ATOL = 1e-3
SETTINGS = {"k": 5, "horizon": 6, "max_new_tokens": 4, "strategy": "greedy", "rollout": "greedy"}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, num: int) -> list[list[int]]:
    encode = tokenizer.apply_chat_template
    options = {"add_generation_prompt": True, "return_dict": True}
    return [encode(chat, **options)["input_ids"] for chat in chats(num)]


def generated(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy tokens by `generate`, each prompt alone; the end token included."""
    rows = []
    for ids in prompts:
        tokens = torch.tensor([ids])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        rows.append(out[0, len(ids) :].tolist())
    return rows


def test_every_decoder_layer_runs_fused(model: PreTrainedModel) -> None:
    assert describe_layers(model).startswith("30 of 30 decoder layers run fused")


def test_greedy_decoding_equals_generate_in_a_batch_and_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = prompt_ids(tokenizer, 10)
    expected = generated(model, prompts, 24)
    options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": 24, "tokenizer": tokenizer}
    together = tq_fast.presets.baseline(prompts, model, batch_size=10, **options)
    assert [ids.tolist() for ids in together.sequences] == expected
    for ids, tokens in zip(prompts[:3], expected, strict=False):
        alone = tq_fast.presets.baseline([ids], model, **options)
        assert alone.sequences[0].tolist() == tokens


def assert_like_the_naive_loop(
    model: PreTrainedModel,
    reward: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num: int = 2,
    atol: float = ATOL,
) -> None:
    """Tokens, candidates and values of Transfer Q* are those of the naive loop."""
    # Plain text, which a reward reads as it stands: of a chat it would read the finished turn.
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS[:num]]
    settings = NaiveSettings(**SETTINGS)
    end = copy.copy(model.generation_config)
    model.generation_config.eos_token_id = None
    try:
        score = classifier_reward(reward)
        truth = [decode_naively(ids, model, score, settings=settings) for ids in prompts]
    finally:
        model.generation_config = end
    options: dict[str, Any] = {**SETTINGS, "eos_token_id": (), "tokenizer": tokenizer}
    result = tq_fast.decode(prompts, model, reward, reward_tokenizer=tokenizer, **options)
    assert [ids.tolist() for ids in result.sequences] == [naive.token_ids for naive in truth]
    for trace, naive in zip(result.traces, truth, strict=True):
        for ours, theirs in zip(trace, naive.steps, strict=True):
            assert ours.candidates.tolist() == theirs.candidates
            torch.testing.assert_close(ours.q.double(), theirs.q, rtol=0, atol=atol)


def test_transfer_q_equals_the_naive_loop(
    model: PreTrainedModel, reward: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert_like_the_naive_loop(model, reward, tokenizer)


def test_transfer_q_equals_the_naive_loop_under_an_adapter(
    model: PreTrainedModel, reward: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 64, "init_lora_weights": False}
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    plain = tq_fast.presets.baseline(
        prompt_ids(tokenizer, 1), model, tokenizer=tokenizer, strategy="greedy", max_new_tokens=8
    )
    ours = tq_fast.presets.baseline(
        prompt_ids(tokenizer, 1), adapted, tokenizer=tokenizer, strategy="greedy", max_new_tokens=8
    )
    expected = generated(adapted, prompt_ids(tokenizer, 1), 8)
    assert [ids.tolist() for ids in ours.sequences] == expected
    assert ours.sequences[0].tolist() != plain.sequences[0].tolist(), "the adapter does nothing"
    assert_like_the_naive_loop(adapted, reward, tokenizer, num=1)


def test_int8_weights_give_the_values_of_the_same_model_in_transformers(
    model: PreTrainedModel, reward: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = copy.deepcopy(model)
    quantize_(quantised.model, Int8WeightOnlyConfig())
    assert describe_layers(quantised) == (
        "30 of 30 decoder layers run fused, 30 with int8 weights, all of them in one call; "
        "210 of 210 linear layers with int8 weights run in the kernel for few rows"
    )
    # The int8 product rounds its rows in bf16 blocks of another shape: up to 0.02 was seen.
    assert_like_the_naive_loop(quantised, reward, tokenizer, num=1, atol=0.05)


def test_bf16_keeps_most_of_the_tokens_of_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    prompts = prompt_ids(tokenizer, 4)
    expected = generated(half, prompts, 12)
    options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": 12, "tokenizer": tokenizer}
    result = tq_fast.presets.baseline(prompts, half, **options)
    # Rounding decides near ties, and what follows a token that differs differs too: the first
    # tokens, at least, must be the same.
    firsts = [ids.tolist()[:2] for ids in result.sequences]
    assert firsts == [tokens[:2] for tokens in expected]
