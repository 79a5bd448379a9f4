"""Any other classifier as a reward: it reads whole texts through its own forward, in batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..forest.language import device_of
from ..forest.view import view_of
from ..prompts import Prompt
from .base import Opening, RewardSession, Texts
from .classifier import ClassifierReward, WholeTexts
from .forms import Row
from .lengths import positions_of_encoder
from .options import RewardOptions
from .returned import read_output

# Whole texts that an encoder scores at a time.
_TEXT_BATCH = 32


class EncoderReward(ClassifierReward):
    """A sequence classifier, or a module in its form, that reads whole texts.

    Args:
        model: takes `input_ids`, and `attention_mask` where texts are padded.
        tokenizer: as for `ClassifierReward`, likewise texts, label, options and num_labels.
        batches: whether a padded text scores as it does alone, so that `_TEXT_BATCH` texts go
            through the model at a time; None: where the configuration has a padding token.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Texts,
        label: int | None,
        *,
        options: RewardOptions | None = None,
        num_labels: int | None = None,
        batches: bool | None = None,
    ) -> None:
        super().__init__(model, tokenizer, texts, label, options=options, num_labels=num_labels)
        self.limit = positions_of_encoder(model, tokenizer)
        self.batches = padding_of(model) is not None if batches is None else batches

    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest; nothing is kept but their form."""
        return _EncoderSession(self, opening.prompts)


class _EncoderSession(WholeTexts):
    def __init__(self, reward: EncoderReward, prompts: Sequence[Prompt]) -> None:
        super().__init__(reward, prompts)
        self.reward = reward
        self.model = view_of(reward.model)

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        rows = self.rows(trees, responses)
        # Rows of like length together, so that little is padded.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
        size = _TEXT_BATCH if self.reward.batches else 1
        scores = [math.nan] * len(rows)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for i, score in zip(chunk, self._forward([rows[i] for i in chunk]), strict=True):
                scores[i] = score
        return scores

    def _forward(self, rows: list[Row]) -> list[float]:
        self.num_token_forwards += len(rows) * max(len(row.token_ids) for row in rows)
        scores = score_rows(self.model, rows)
        return [float(score) for score in scores[:, self.reward.column].tolist()]


def score_rows(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Return what the model's own forward says of texts: scores `[B, labels]`.

    Raises:
        WrongScores: its output holds no scores in that shape.
    """
    pad, device = padding_of(model) or 0, device_of(model)
    width = max(len(row.token_ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        filled = [[*value, *[filler] * (width - len(value))] for value in values]
        return torch.tensor(filled, device=device)

    inputs = {
        "input_ids": padded([row.token_ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.token_ids) for row in rows], 0),
    }
    types = [row.type_ids for row in rows if row.type_ids is not None]
    if len(types) == len(rows):
        inputs["token_type_ids"] = padded(types, 0)
    taken = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    # Classifiers without token types may hand unknown arguments on to a backbone that has none.
    names = {"input_ids", *(("attention_mask",) if takes_all else ()), *taken}
    output = model(**{name: value for name, value in inputs.items() if name in names})
    return read_output(output, len(rows))


def padding_of(model: torch.nn.Module) -> int | None:
    """The model's own padding token, where its configuration has one."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    pad = config.get_text_config().pad_token_id
    return None if pad is None else int(pad)
