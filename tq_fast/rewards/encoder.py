"""Any other sequence classifier as a reward: it reads whole texts, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..forest.language import device_of
from ..forest.view import view_of
from ..prompts import Prompt
from .base import Opening, RewardSession, drop_from
from .classifier import ClassifierReward

# Whole texts that an encoder scores at a time.
_TEXT_BATCH = 32


class EncoderReward(ClassifierReward):
    """A sequence classifier that reads whole texts, `_TEXT_BATCH` at a time."""

    def open(self, opening: Opening) -> RewardSession:
        return _EncoderSession(self, opening.prompts)


class _EncoderSession:
    peak_kv_bytes = 0

    def __init__(self, reward: EncoderReward, prompts: Sequence[Prompt]) -> None:
        self.reward = reward
        self.prompts = list(prompts)
        self.num_token_forwards = 0
        self.model = view_of(reward.model)
        self.pad = reward.model.config.get_text_config().pad_token_id

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        rows = [
            self.reward.encode(self.prompts[tree], response)
            for tree, response in zip(trees, responses, strict=True)
        ]
        self.reward.check_length(max(map(len, rows)))
        # Rows of like length together, so that little is padded.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = 1 if self.pad is None else _TEXT_BATCH
        scores = [math.nan] * len(rows)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for i, score in zip(chunk, self._forward([rows[i] for i in chunk]), strict=True):
                scores[i] = score
        return scores

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.prompts[tree] = prompt

    def drop_tree(self, tree: int) -> None:
        drop_from(self.prompts, tree)

    def _forward(self, rows: list[list[int]]) -> list[float]:
        device = device_of(self.reward.model)
        width = max(map(len, rows))
        self.num_token_forwards += len(rows) * width
        pad = 0 if self.pad is None else self.pad
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
        )
        logits = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits.float()[:, self.reward.label].tolist()
