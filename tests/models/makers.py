"""Small models, tokenizers and adapters, and decoders over them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import tq_fast

FAST: dict[str, Any] = {"k": 3, "horizon": 2, "max_new_tokens": 3, "strategy": "greedy"}


def make_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", additional_special_tokens=extra
    )


def config(vocab_size: int = 258, **fields: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=None,
        pad_token_id=None,
        **fields,
    )


def make_model(seed: int = 0, vocab_size: int = 258) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(vocab_size)).eval()


def make_reward(seed: int = 1, vocab_size: int = 258) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(vocab_size, num_labels=1)).eval()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields
    )


def length(prompts: list[Any], responses: list[Any]) -> list[float]:
    return [float(len(response)) for response in responses]


def decoder_of(baseline: Any, **arguments: Any) -> tq_fast.TransferDecoder:
    arguments = {"tokenizer": make_tokenizer(), "device": "cpu", **arguments}
    return tq_fast.TransferDecoder(baseline, arguments.pop("reward", length), **arguments)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.tensor([[72, 73, 74]])).logits[0, -1]


def next_logits(decoder: tq_fast.TransferDecoder) -> dict[str, torch.Tensor]:
    """The log-probs of the first candidates under both models, from a decode."""
    trace = decoder.decode("abc", **FAST).traces[0][0]
    return {"ids": trace.candidates, "prior": trace.prior_logprobs}
