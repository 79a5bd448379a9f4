"""Texts and classifiers that the tests of rewards share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests import zoo
from tq_fast.prompts import Prompt

# fp32, other orders of summation; scores of the zoo stay below 5.
ATOL = 1e-5
PROMPTS = [
    "She asked: what is the fastest way?",
    "Numbers like",
    "The old lighthouse keeper wrote letters to the sea and the loop was slow.",
]
CHATS = [
    [{"role": "user", "content": "What is the fastest way to the station?"}],
    [
        {"role": "system", "content": "A good answer is short."},
        {"role": "user", "content": "Is 1024 a power of two?"},
    ],
]


def whole_text(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, response: list[int]) -> str:
    """Prompt and response, as the language model's own tokenizer reads them in one go."""
    before = tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
    both = tokenizer.decode([*prompt.token_ids, *response], skip_special_tokens=True)
    assert both.startswith(before)
    return prompt.given + both[len(before) :]


def plain_score(model: PreTrainedModel, ids: Sequence[int], label: int = 0) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([list(ids)])).logits[0, label])


def scorer(tokenizer: PreTrainedTokenizerFast, **options: object) -> PreTrainedModel:
    return zoo.classifier("llama", vocab_size=len(tokenizer), **options)


def encoder(vocab_size: int, *, num_labels: int = 1, max_positions: int = 128) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=max_positions,
        num_labels=num_labels,
        pad_token_id=0,
    )
    return zoo.spread_weights(BertForSequenceClassification(config), 3).eval()
