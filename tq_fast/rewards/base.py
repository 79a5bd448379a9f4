"""Rewards: whole responses in, one score each out.

A reward is opened for the prompts of a forest (`open`); the session that it returns scores rows of
new token ids and forgets a tree when its response is complete. Three kinds:

    FunctionReward   a function `(prompts, responses) -> floats`; function.py
    CausalReward     a causal sequence classifier over its own forest; causal.py
    EncoderReward    any other sequence classifier: whole texts, in batches; encoder.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..prompts import Prompt

RewardFunction = Callable[[list[Any], list[Any]], Sequence[float]]

# Tokens of the prompt that are decoded together with a response, so that a tokenizer which drops
# the space at the start of a text does not drop it at the join.
_JOIN_CONTEXT = 8


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a reward is opened for: a forest with one tree a prompt.

    Attributes:
        prompts: one a tree.
        num_rows: responses in one call of `score`, at most.
        max_new: tokens of a response, at most.
        backend: which backend the ops of a forest use.
        waiting: prompts that will replace those.
        skip_special_tokens: whether a function sees responses without their special tokens.
    """

    prompts: Sequence[Prompt]
    num_rows: int
    max_new: int
    backend: str | None
    waiting: Sequence[Prompt] = ()
    skip_special_tokens: bool = True


class RewardSession(Protocol):
    """A reward at work on the prompts of one forest."""

    num_token_forwards: int
    peak_kv_bytes: int

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        """Score `responses[i]` (new token ids) to the prompt of `trees[i]` (ascending)."""
        ...

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        """`tree` is of `prompt` from now on; nothing of what it was is kept."""
        ...

    def drop_tree(self, tree: int) -> None:
        """Forget `tree`; the last tree takes over its place."""
        ...


class Reward(Protocol):
    """Something that scores responses.

    Attributes:
        model: the classifier that scores; None where the reward is a function.
        tokenizer: the classifier's own; None where it reads the baseline's token ids.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest."""
        ...

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that the reward keeps for a token; 0 where it keeps none."""
        ...


class Texts:
    """Turns prompts and new token ids into the texts that rewards read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer

    def response(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The response on its own, special tokens left out unless they are wanted."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def continuation(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """The response as it continues the prompt, with the space at the join if there is one."""
        context = list(prompt.token_ids[-_JOIN_CONTEXT:])
        before = self.response(context)
        whole = self.response([*context, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self.response(token_ids)

    def whole(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """Prompt and response as one text."""
        given = prompt.given
        before = given if isinstance(given, str) else self.response(prompt.token_ids)
        return before + self.continuation(prompt, token_ids)


def drop_from(entries: list[Any], idx: int) -> None:
    """Remove `entries[idx]`; the last entry takes over its place."""
    entries[idx] = entries[-1]
    entries.pop()
