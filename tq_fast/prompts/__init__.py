"""Prompts as users give them (text, chat messages, token ids), made into token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidArgument, warn_caller
from .chats import (
    Messages,
    TemplateOptions,
    chat_token_ids,
    check_template_options,
    ends_with_assistant,
    is_message,
    read_messages,
    unread_options,
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: ids that the language models see.
        given: the prompt as rewards see it: the text that was given, the messages with text as
            their content, the decoded text of token ids, or the ids themselves where there is no
            tokenizer.
        key: key of its random stream, int64.
        is_continued: the last message is the assistant's, and the response goes on with it.
        template_options: what the templates of rewards get too, beside the messages.
    """

    token_ids: tuple[int, ...]
    given: str | Messages | list[int]
    key: int
    is_continued: bool = False
    template_options: TemplateOptions = dataclasses.field(default_factory=dict, hash=False)


# Columns of data sets, arrays and batches of a tokenizer count too: `read_prompts` has the list.
PromptLike: TypeAlias = str | Messages | torch.Tensor | Sequence[int] | Mapping[str, Any] | Prompt


class PromptReader:
    """Reads prompts one at a time, so that one that is wrong stops no other.

    Prompts with equal ids get different random streams, by the count of their equals that this
    reader read before; apart from that a stream depends on the ids alone, so that a prompt decodes
    alone as it does among others.

    Args:
        tokenizer: the language models'; None where prompts are token ids.
        vocab_size: ids must be below.
        template_options: further arguments of `apply_chat_template`, for prompts that are chats.

    Raises:
        InvalidArgument: `template_options` are wrong.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        vocab_size: int,
        template_options: TemplateOptions | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.template_options = check_template_options(template_options)
        self._num_equals: dict[tuple[int, ...], int] = {}
        self._said: set[str] = set()

    def read(self, idx: int, prompt: PromptLike) -> Prompt:
        """Return the `Prompt` that `prompt` is; one that was read already stays as it is.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, the value and what was expected.
        """
        if isinstance(prompt, Prompt):
            return prompt
        read = self._encode(idx, prompt)
        token_ids = read.token_ids
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
        return dataclasses.replace(read, key=_stream_key(token_ids, count))

    def _encode(self, idx: int, prompt: Any) -> Prompt:
        """The prompt without its key."""
        if isinstance(prompt, str):
            self._require_tokenizer(idx, "text")
            return Prompt(self._encode_text(prompt), prompt, 0)
        ids = _as_token_ids(idx, prompt)
        if ids is not None:
            return Prompt(ids, self._text_of(idx, ids), 0)
        chat = _plain(prompt)
        if isinstance(chat, (list, tuple)) and chat and all(map(is_message, chat)):
            return self._encode_chat(idx, chat)
        raise InvalidArgument(
            f"prompts[{idx}] must be text, chat messages (mappings with 'role' and 'content') or "
            f"token ids, got {prompt!r}"
        )

    def _encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` with one BOS, as the tokenizer puts it, and without a closing EOS."""
        tokenizer: Any = self.tokenizer
        if not text:
            return ()
        bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
        is_rendered = bool(bos) and text.startswith(bos)
        ids = list(tokenizer(text, add_special_tokens=not is_rendered)["input_ids"])
        if not is_rendered and eos is not None and ids[-1:] == [eos]:
            bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if bare[-1:] != [eos]:
                ids.pop()
                self._say_once(
                    f"the tokenizer appends its end-of-sequence token {tokenizer.eos_token!r} to "
                    "text; it was left out of the prompts, since responses follow them"
                )
        return tuple(ids)

    def _text_of(self, idx: int, ids: tuple[int, ...]) -> str | list[int]:
        """The prompt that token ids are to rewards."""
        tokenizer = self.tokenizer
        if tokenizer is None or not all(0 <= token < len(tokenizer) for token in ids):
            return list(ids)
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            warn_caller(
                f"prompts[{idx}] begins with the token {tokenizer.bos_token!r} twice; text that a "
                "chat template rendered needs add_special_tokens=False when it is tokenised"
            )
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def _encode_chat(self, idx: int, messages: Messages) -> Prompt:
        tokenizer = self._require_tokenizer(idx, "chat messages")
        options = dict(self.template_options)
        if not (tokenizer.chat_template or options.get("chat_template")):
            raise InvalidArgument(
                f"prompts[{idx}] is chat messages, but the baseline's tokenizer has no chat "
                "template; pass text or token ids"
            )
        try:
            chat = read_messages(messages)
            wanted = options.pop("continue_final_message", True)
            is_continued = bool(wanted) and ends_with_assistant(chat)
            ids = chat_token_ids(
                tokenizer,
                chat,
                add_generation_prompt=not is_continued,
                continue_final_message=is_continued,
                options=options,
            )
        except InvalidArgument as error:
            raise InvalidArgument(f"prompts[{idx}]: {error}") from error
        for name in unread_options(tokenizer, options):
            self._say_once(
                f"template_options: the chat template does not read {name!r}, which changes nothing"
            )
        # Another model's template stays with the model that it was given for.
        shared = {name: value for name, value in options.items() if name != "chat_template"}
        return Prompt(tuple(ids), chat, 0, is_continued, shared)

    def _require_tokenizer(self, idx: int, kind: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidArgument(
                f"prompts[{idx}] is {kind}, but the baseline came without a tokenizer; pass "
                "tokenizer= or token ids"
            )
        return self.tokenizer

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warn_caller(message)


def read_prompts(
    prompts: PromptLike | Iterable[PromptLike],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    template_options: TemplateOptions | None = None,
) -> list[Prompt]:
    """Return one `Prompt` for each prompt in `prompts`.

    A string, one chat (a list of message mappings), a 1-D tensor or array of integers and a list of
    integers are one prompt each; a list, a column of a data set or any other iterable of these, and
    a 2-D tensor or array, are many. What a tokenizer returns (a mapping with `input_ids` and
    `attention_mask`) is one prompt or many too: the mask takes the padding out. The random streams
    are those that one `PromptReader` gives.

    A chat whose last message is the assistant's is continued, unless `template_options` has
    `continue_final_message=False`. Text that begins with the tokenizer's BOS, as a chat template
    renders it, gets no second one; an EOS that a tokenizer appends is taken off.

    Raises:
        InvalidArgument: the message names the prompt's position, the value and what was expected.
    """
    reader = PromptReader(tokenizer, vocab_size=vocab_size, template_options=template_options)
    given = _split(prompts)
    if _is_table(prompts):
        _warn_of_padding(given, tokenizer)
    return [reader.read(idx, prompt) for idx, prompt in enumerate(given)]


def repeat_prompts(prompts: Sequence[Prompt], num: int) -> list[Prompt]:
    """Return every prompt `num` times in a row, each with a random stream of its own.

    The first keeps the prompt's own stream.
    """
    return [
        dataclasses.replace(prompt, key=_hash((prompt.key, number))) if number else prompt
        for prompt in prompts
        for number in range(num)
    ]


def _split(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Prompt)):
        return [prompts]
    if isinstance(prompts, torch.Tensor) and prompts.ndim not in (1, 2):
        raise InvalidArgument(
            f"prompts must be a tensor [P] or [G, P], got shape {tuple(prompts.shape)}"
        )
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            names = ", ".join(map(repr, prompts)) or "none"
            raise InvalidArgument(
                "prompts must be text, chat messages, token ids or a list of these; a mapping must "
                f"have 'input_ids', its keys are {names}. A chat is a list of messages; of a data "
                "set pass one column"
            )
        return _split_batch(prompts)
    if isinstance(prompts, torch.Tensor):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if hasattr(prompts, "columns") or hasattr(prompts, "column_names"):
        raise InvalidArgument(
            f"prompts is a whole table ({type(prompts).__name__}); pass the column that holds the "
            "prompts"
        )
    plain = _plain(prompts)
    is_iterable = isinstance(plain, Iterable) or hasattr(plain, "__getitem__")
    if not is_iterable or isinstance(plain, (bytes, bytearray, set, frozenset)):
        raise InvalidArgument(
            "prompts must be text, chat messages, token ids or a list of these, "
            f"got {type(prompts).__name__}"
        )
    items = list(plain)
    is_one = bool(items) and (all(map(_is_int, items)) or all(map(is_message, items)))
    return [items] if is_one else items


def _split_batch(batch: Mapping[str, Any]) -> list[Any]:
    """The prompts of what a tokenizer returned, one or many, each with its mask."""
    ids, mask = _plain(batch["input_ids"]), _plain(batch.get("attention_mask"))
    if not ids or _is_int(ids[0]):
        return [{"input_ids": ids, "attention_mask": mask}]
    if mask is None:
        return list(ids)
    if len(mask) != len(ids):
        raise InvalidArgument(
            f"prompts has {len(ids)} rows of 'input_ids' and {len(mask)} of 'attention_mask'"
        )
    return [
        {"input_ids": row, "attention_mask": of_row} for row, of_row in zip(ids, mask, strict=True)
    ]


def _as_token_ids(idx: int, prompt: Any) -> tuple[int, ...] | None:
    """The token ids that `prompt` is, padding taken out by its mask; None if it is none."""
    mask = None
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        prompt, mask = prompt["input_ids"], _row(prompt.get("attention_mask"))
    if isinstance(prompt, torch.Tensor):
        is_row = prompt.ndim == 1 or (prompt.ndim == 2 and prompt.shape[0] == 1)
        if not is_row or prompt.dtype not in (torch.int64, torch.int32):
            raise InvalidArgument(
                f"prompts[{idx}] must be a 1-D integer tensor, got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}"
            )
    row = _row(prompt)
    if not isinstance(row, (list, tuple)) or not all(map(_is_int, row)):
        return None
    if mask is not None:
        if len(mask) != len(row):
            raise InvalidArgument(
                f"prompts[{idx}] has {len(row)} 'input_ids' and an 'attention_mask' of {len(mask)}"
            )
        row = [token for token, is_kept in zip(row, mask, strict=True) if is_kept]
    return tuple(map(int, row))


def _row(value: Any) -> Any:
    """`value` as a list, a leading axis of size 1 left out."""
    row = _plain(value)
    is_nested = isinstance(row, list) and len(row) == 1 and isinstance(row[0], list)
    return row[0] if is_nested else row


def _plain(value: Any) -> Any:
    """Python's own values in the place of tensors, arrays and columns (numpy, pandas, Arrow)."""
    for name in ("to_pylist", "tolist", "to_list"):
        convert = getattr(value, name, None)
        if callable(convert):
            return convert()
    return value


def _is_table(prompts: Any) -> bool:
    """Whether `prompts` is a tensor or an array of several rows of token ids."""
    return getattr(prompts, "ndim", 0) == 2 and len(prompts) > 1


def _warn_of_padding(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Warn of rows that begin or end with the padding token while others do not."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if pad is None:
        return
    found: set[int] = set()
    for end in (0, -1):
        padded = {idx for idx, row in enumerate(rows) if len(row) and row[end] == pad}
        found |= padded if len(padded) < len(rows) else set()
    if found:
        named = ", ".join(f"prompts[{idx}]" for idx in sorted(found)[:5])
        named += ", ..." if len(found) > 5 else ""
        warn_caller(
            f"{named}: the padding token {pad} stands at an end, and is read as a part of the "
            "prompt; pass what the tokenizer returned, with its attention_mask, or lists without "
            "padding"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _stream_key(token_ids: tuple[int, ...], count: int) -> int:
    return _hash((token_ids, count))


def _hash(value: object) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
