"""Tiny random models in folders, as a user has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tq_fast.values.head import ValueHead, ValueHeadConfig

WORDS = ["<unk>", "<pad>", "<end>", "user:", "assistant:", *"abcdefghijklmnopqrstuvwxyz"]
MAX_POSITIONS = 64
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Trio(NamedTuple):
    """Folders of models that share a vocabulary, and one more reward."""

    baseline: Path
    sft: Path
    reward: Path
    other_reward: Path

    def value_head(self, seed: int = 0) -> Path:
        """The folder of a head with random weights for the SFT model; made at first use."""
        folder = self.sft.with_name(f"value-{seed}")
        if not folder.exists():
            generator = torch.Generator().manual_seed(seed)
            head = ValueHead(ValueHeadConfig(32, len(WORDS), width=8, rank=4))
            with torch.no_grad():
                for weight in head.parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator))
            head.save(folder)
        return folder


def _save(kind: type, folder: Path, seed: int, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=1,
        **options,
    )
    kind(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_trio(folder: Path) -> Trio:
    """Make every model, with random weights that never change."""
    return Trio(
        _save(LlamaForCausalLM, folder / "baseline", 0),
        _save(LlamaForCausalLM, folder / "sft", 1),
        _save(LlamaForSequenceClassification, folder / "reward", 2, num_labels=1),
        _save(LlamaForSequenceClassification, folder / "other_reward", 3, num_labels=1),
    )
