"""The models of `bench.peers`, saved so that both sides load the same weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bench.decode_models import VOCAB_SIZE, random_duo


def save_models(folder: Path) -> None:
    """Save `baseline` and `reward`, and a `tokenizer` that names every id.

    vLLM does not open a classifier without a tokenizer. It lies in a folder of its own, because
    all prompts here are token ids.
    """
    duo = random_duo()
    duo.baseline.save_pretrained(folder / "baseline")
    duo.reward.save_pretrained(folder / "reward")
    words = {f"t{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t0",
        unk_token="t0",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
