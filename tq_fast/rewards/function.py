"""A plain function as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..prompts import Prompt
from .base import Opening, RewardFunction, RewardSession, Texts, drop_from


class FunctionReward:
    """A plain function `(prompts, responses) -> floats`.

    It gets the prompts as they were given (token ids as text) and the responses as text, without
    special tokens unless skip_special_tokens=False. Without a tokenizer both are lists of token
    ids.
    """

    model = None
    tokenizer = None

    def __init__(self, function: RewardFunction, texts: Texts) -> None:
        self.function = function
        self.texts = texts

    def open(self, opening: Opening) -> RewardSession:
        return _FunctionSession(self, opening)

    def kv_bytes_per_token(self) -> int:
        return 0


class _FunctionSession:
    num_token_forwards = 0
    peak_kv_bytes = 0

    def __init__(self, reward: FunctionReward, opening: Opening) -> None:
        self.reward = reward
        self.prompts = list(opening.prompts)
        self.skip_special_tokens = opening.skip_special_tokens

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        texts = self.reward.texts
        if texts.tokenizer is None:
            shown: list[Any] = [list(ids) for ids in responses]
        else:
            skip = self.skip_special_tokens
            shown = [texts.response(ids, skip_special_tokens=skip) for ids in responses]
        scores = self.reward.function([self.prompts[tree].given for tree in trees], shown)
        if isinstance(scores, torch.Tensor):
            scores = scores.reshape(-1)
        return [float(score) for score in scores]

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.prompts[tree] = prompt

    def drop_tree(self, tree: int) -> None:
        drop_from(self.prompts, tree)
