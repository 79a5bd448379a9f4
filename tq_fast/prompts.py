"""Prompts as users give them (text, chat messages, token ids), made into token ids."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from .errors import InvalidArgument

Messages: TypeAlias = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: ids that the language models see.
        given: the prompt as rewards see it: the text or the messages that were given, the decoded
            text of token ids, or the ids themselves where there is no tokenizer.
        key: key of its random stream, int64.
    """

    token_ids: tuple[int, ...]
    given: str | Messages | list[int]
    key: int


PromptLike: TypeAlias = str | Messages | torch.Tensor | Sequence[int] | Prompt


class PromptReader:
    """Reads prompts one at a time, so that one that is wrong stops no other.

    Prompts with equal ids get different random streams, by the count of their equals that this
    reader read before; apart from that a stream depends on the ids alone, so that a prompt decodes
    alone as it does among others.

    Args:
        tokenizer: the language models'; None where prompts are token ids.
        vocab_size: ids must be below.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._num_equals: dict[tuple[int, ...], int] = {}

    def read(self, idx: int, prompt: PromptLike) -> Prompt:
        """Return the `Prompt` that `prompt` is; one that was read already stays as it is.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, the value and what was expected.
        """
        if isinstance(prompt, Prompt):
            return prompt
        token_ids, given = _encode(idx, prompt, self.tokenizer)
        if not token_ids:
            raise InvalidArgument(f"prompts[{idx}] is empty (no tokens): {prompt!r}")
        wrong = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise InvalidArgument(
                f"prompts[{idx}] has token id {wrong[0]}, outside of the vocabulary "
                f"[0, {self.vocab_size})"
            )
        count = self._num_equals.get(token_ids, 0)
        self._num_equals[token_ids] = count + 1
        return Prompt(token_ids, given, _stream_key(token_ids, count))


def read_prompts(
    prompts: PromptLike | Sequence[PromptLike] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
) -> list[Prompt]:
    """Return one `Prompt` for each prompt in `prompts`.

    A string, one chat (a list of message mappings), a 1-D tensor and a list of integers are one
    prompt each; a list of any of these, and a 2-D tensor, are many. Their random streams are those
    that one `PromptReader` gives.

    Raises:
        InvalidArgument: the message names the prompt's position, the value and what was expected.
    """
    reader = PromptReader(tokenizer, vocab_size=vocab_size)
    return [reader.read(idx, prompt) for idx, prompt in enumerate(_split(prompts))]


def _split(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Prompt)):
        return [prompts]
    if isinstance(prompts, torch.Tensor):
        if prompts.ndim not in (1, 2):
            raise InvalidArgument(
                f"prompts must be a tensor [P] or [G, P], got shape {tuple(prompts.shape)}"
            )
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if isinstance(prompts, (list, tuple)):
        if prompts and all(_is_message(item) or _is_int(item) for item in prompts):
            return [prompts]
        return list(prompts)
    raise InvalidArgument(
        "prompts must be text, chat messages, token ids or a list of these, "
        f"got {type(prompts).__name__}"
    )


def _encode(
    idx: int, prompt: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], Any]:
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim != 1 or prompt.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(
                f"prompts[{idx}] must be a 1-D integer tensor, got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}"
            )
        prompt = prompt.tolist()
    if isinstance(prompt, (list, tuple)) and all(_is_int(token) for token in prompt):
        ids = tuple(prompt)
        in_range = tokenizer is not None and all(0 <= token < len(tokenizer) for token in ids)
        given = tokenizer.decode(ids, skip_special_tokens=True) if in_range else list(ids)
        return ids, given
    if isinstance(prompt, str):
        _require_tokenizer(idx, tokenizer, "text")
        return tuple(tokenizer(prompt)["input_ids"]) if prompt else (), prompt
    if isinstance(prompt, (list, tuple)) and all(_is_message(item) for item in prompt):
        _require_tokenizer(idx, tokenizer, "chat messages")
        if not tokenizer.chat_template:
            raise InvalidArgument(
                f"prompts[{idx}] is chat messages, but the baseline's tokenizer has no chat "
                "template; pass text or token ids"
            )
        return tuple(chat_token_ids(tokenizer, prompt, add_generation_prompt=True)), prompt
    raise InvalidArgument(
        f"prompts[{idx}] must be text, chat messages (mappings with 'role' and 'content') or "
        f"token ids, got {prompt!r}"
    )


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a chat under the tokenizer's own template."""
    encoded = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
    )
    return encoded["input_ids"]


def _stream_key(token_ids: tuple[int, ...], count: int) -> int:
    digest = hashlib.blake2b(repr((token_ids, count)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _require_tokenizer(idx: int, tokenizer: PreTrainedTokenizerBase | None, kind: str) -> None:
    if tokenizer is None:
        raise InvalidArgument(
            f"prompts[{idx}] is {kind}, but the baseline came without a tokenizer; pass "
            "tokenizer= or token ids"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value
