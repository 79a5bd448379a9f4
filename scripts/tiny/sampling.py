"""Responses from a causal LM and scores from a reward model, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Samples:
    """One response a prompt: its text, its number of tokens, and whether it reached EOS."""

    texts: list[str]
    lengths: list[int]
    ended: list[bool]


def load_lm(folder: Path) -> PreTrainedModel:
    """Load a causal LM in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    seed: int,
    batch_size: int = 256,
) -> Samples:
    """Sample one response a prompt at temperature 1, without truncation."""
    set_seed(seed)
    texts: list[str] = []
    lengths: list[int] = []
    ended: list[bool] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            list(prompts[start : start + batch_size]), return_tensors="pt", padding=True
        )
        output = model.generate(
            **inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
        lengths += (output != tokenizer.pad_token_id).sum(1).tolist()
        ended += (output == tokenizer.eos_token_id).any(1).tolist()
    return Samples(texts, lengths, ended)


@torch.inference_mode()
def score(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    responses: Sequence[str],
    batch_size: int = 256,
) -> list[float]:
    """Score whole texts, EOS included, under a reward model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [p + r + tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)]
    scores: list[float] = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        scores += model(**inputs).logits[:, 0].tolist()
    return scores
