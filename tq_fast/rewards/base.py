"""Rewards: whole responses in, one score each out.

A reward is opened for the prompts of a forest (`open`); the session that it returns scores rows of
new token ids and forgets a tree when its response is complete. The kinds:

    FunctionReward    a function of texts, in this package's or TRL's form; function.py
    PipelineReward    a text-classification pipeline of transformers; objects.py
    PredictorReward   an object with `predict(pairs)`, as a CrossEncoder; objects.py
    CausalReward      a causal sequence classifier over its own forest; causal.py
    EncoderReward     any other classifier or module: whole texts, in batches; encoder.py

`kinds.py` finds out which of them an object is.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..forest.store import ForestStore
from ..prompts import Prompt

RewardFunction = Callable[..., Any]

# Tokens of the prompt that are decoded together with a response, so that a tokenizer which drops
# the space at the start of a text does not drop it at the join.
_JOIN_CONTEXT = 8


class WrongScores(TypeError):
    """A reward returned something that is not one number a response; the message says what."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """The forest that a reward is opened for, with one tree a prompt.

    Attributes:
        prompts: one a tree.
        num_rows: responses in one call of `score`, at most.
        max_new: tokens of a response, at most.
        backend: which backend the ops of a forest use.
        waiting: prompts that will replace those.
        graphs: whether passes over a forest run as CUDA graphs, on a GPU.
        compiled_modules: whether norms, MLPs and rotary embeddings of a forest run compiled.
        forests: where forests come from.
    """

    prompts: Sequence[Prompt]
    num_rows: int
    max_new: int
    backend: str | None
    waiting: Sequence[Prompt] = ()
    graphs: bool = False
    compiled_modules: bool = False
    forests: ForestStore = dataclasses.field(default_factory=ForestStore)


class RewardSession(Protocol):
    """A reward at work on the prompts of one forest."""

    @property
    def num_token_forwards(self) -> int:
        """Tokens that went through the reward's model so far."""
        ...

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes of KV that the reward held so far."""
        ...

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        """Score `responses[i]` (new token ids) to the prompt of `trees[i]` (ascending)."""
        ...

    def keep(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        """Keep what is known of responses that were scored last: they will be continued.

        At most one a tree, which may be cut anywhere before it is continued.
        """
        ...

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        """`tree` is of `prompt` from now on; nothing of what it was is kept."""
        ...

    def drop_tree(self, tree: int) -> None:
        """Forget `tree`; the last tree takes over its place."""
        ...


class Reward(abc.ABC):
    """Something that scores responses.

    Attributes:
        source: the model, function or object that scores, as another decode would be given it.
        model: the module that scores; None where none is known.
        tokenizer: the reward's own; None where it reads the baseline's token ids, or text.
        label: which of several labels is the reward; None where there is one.
    """

    source: Any
    model: torch.nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    label: int | None = None

    @property
    def name(self) -> str:
        """The name of the reward in messages and records."""
        return str(getattr(self.source, "__qualname__", type(self.source).__qualname__))

    @abc.abstractmethod
    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest."""

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that the reward keeps for a token; 0 where it keeps none."""
        return 0

    def check_prompt(
        self, idx: int, prompt: Prompt, num_new: int, settings: str, *, role: str
    ) -> None:
        """Refuse a prompt that the reward cannot read, and warn of one that it reads wrongly.

        Args:
            idx: position of the prompt in the call.
            prompt: the prompt.
            num_new: tokens after the prompt, at most.
            settings: what `num_new` comes from, for the message.
            role: the reward's role, for the message.

        Raises:
            InvalidArgument: the message names `prompts[idx]` and what is wrong.
        """
        return


class Texts:
    """Turns prompts and new token ids into the texts that rewards read.

    Args:
        tokenizer: the language models'; None where prompts are token ids.
        keep_special_tokens: responses keep special tokens that are no part of the chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, keep_special_tokens: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.keep_special_tokens = keep_special_tokens

    def response(self, token_ids: Sequence[int]) -> str:
        """The response on its own, special tokens left out."""
        assert self.tokenizer is not None, "there is no tokenizer to decode with"
        if self.keep_special_tokens:
            kept = [token for token in token_ids if token not in self._structure]
            return str(self.tokenizer.decode(kept, skip_special_tokens=False))
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def continuation(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """The response as it continues the prompt, with the space at the join if there is one."""
        context = list(prompt.token_ids[-_JOIN_CONTEXT:])
        before = self.response(context)
        whole = self.response([*context, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self.response(token_ids)

    def before(self, prompt: Prompt) -> str:
        """The prompt as text; of a chat, what the language models read without its markers."""
        return prompt.given if isinstance(prompt.given, str) else self.response(prompt.token_ids)

    @functools.cached_property
    def _structure(self) -> frozenset[int]:
        """Special tokens that begin and end texts and turns."""
        assert self.tokenizer is not None
        own = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ids = {*own, self.tokenizer.pad_token_id, self.tokenizer.cls_token_id}
        ids |= {self.tokenizer.sep_token_id, *_template_token_ids(self.tokenizer)}
        special = set(self.tokenizer.all_special_ids)
        return frozenset(token for token in ids if token in special)


def _template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        return []
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:
        # A template of any author, which may want other messages: its markers stay unknown.
        return []
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def drop_from(entries: list[Any], idx: int) -> None:
    """Remove `entries[idx]`; the last entry takes over its place."""
    entries[idx] = entries[-1]
    entries.pop()
