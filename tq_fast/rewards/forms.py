"""The form in which a classifier reads a prompt with its response: one a prompt, then row by row.

TokenForm   plain text whose token ids are the reward's own
TextForm    plain text under another tokenizer
ChatForm    a conversation under the reward's chat template, the answer's turn closed by it
PairForm    prompt and response as two texts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from ..prompts import Prompt
from ..prompts.chats import Messages
from .base import Texts
from .chats import render


class Row(NamedTuple):
    """The input of a classifier for one response.

    Attributes:
        token_ids: prompt and response.
        parts: which text each token is of, 0 or 1, None for special tokens; of pairs only.
        type_ids: the tokenizer's token types; of pairs only.
    """

    token_ids: list[int]
    parts: list[int | None] | None = None
    type_ids: list[int] | None = None


class Form(Protocol):
    """How one prompt is read.

    Attributes:
        counts_response: whether a token of the response is one token for the reward too.
    """

    counts_response: bool

    def row(self, token_ids: Sequence[int]) -> Row:
        """Return what the reward reads of the prompt and the response `token_ids`."""
        ...


class TokenForm:
    """Plain text in the baseline's token ids.

    Args:
        prompt: the prompt.
        tokenizer: what the ids mean; None where that is not known.
    """

    counts_response = True

    def __init__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._prompt_ids = without_double_start(list(prompt.token_ids), tokenizer)

    def row(self, token_ids: Sequence[int]) -> Row:
        return Row([*self._prompt_ids, *token_ids])


class TextForm:
    """Plain text under the reward's own tokenizer.

    Args:
        prompt: the prompt.
        before: the prompt as text.
        texts: decodes responses.
        tokenizer: the reward's.
    """

    counts_response = False

    def __init__(
        self, prompt: Prompt, before: str, texts: Texts, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._prompt = prompt
        self._before = before
        self._texts = texts
        self._tokenizer = tokenizer

    def row(self, token_ids: Sequence[int]) -> Row:
        whole = self._before + self._texts.continuation(self._prompt, token_ids)
        return Row(
            without_double_start(
                self._tokenizer(whole, verbose=False)["input_ids"], self._tokenizer
            )
        )


class PairForm:
    """Prompt and response as the two texts of a pair.

    Args:
        prompt: the prompt.
        question: its text.
        texts: decodes responses.
        tokenizer: the reward's.
    """

    counts_response = False

    def __init__(
        self, prompt: Prompt, question: str, texts: Texts, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._prompt = prompt
        self._question = question
        self._texts = texts
        self._tokenizer = tokenizer

    def row(self, token_ids: Sequence[int]) -> Row:
        is_text = isinstance(self._prompt.given, str)
        texts = self._texts
        answer = (
            texts.continuation(self._prompt, token_ids) if is_text else texts.response(token_ids)
        )
        encoded = self._tokenizer(self._question, answer, verbose=False)
        return Row(
            list(encoded["input_ids"]),
            encoded.sequence_ids(0) if self._tokenizer.is_fast else None,
            encoded.get("token_type_ids"),
        )


class ChatForm:
    """A conversation as `tokenizer.apply_chat_template(messages + answer)` gives it.

    Only what follows the last special token before the answer is made into tokens anew.

    Args:
        prompt: the prompt.
        messages: the chat that it is.
        texts: decodes responses.
        tokenizer: its template renders the chat, and the reward reads its ids.
    """

    counts_response = False

    def __init__(
        self,
        prompt: Prompt,
        messages: Messages,
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._prompt = prompt
        self._texts = texts
        self._tokenizer = tokenizer
        self._messages = list(messages)
        self._begun: Mapping[str, Any] | None = None
        if prompt.is_continued:
            self._begun = self._messages.pop()
        self._start, self._start_ids = self._common_start()

    def row(self, token_ids: Sequence[int]) -> Row:
        if self._begun is None:
            text = self._texts.response(token_ids)
        else:
            text = self._texts.continuation(self._prompt, token_ids)
        rendered = self._rendered(text)
        if not rendered.startswith(self._start):
            return Row(self._encode(rendered))
        return Row([*self._start_ids, *self._encode(rendered[len(self._start) :])])

    def _rendered(self, text: str) -> str:
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if self._begun is not None:
            begun = self._begun["content"]
            is_text = isinstance(begun, str)
            content = begun + text if is_text else [*begun, {"type": "text", "text": text}]
            answer = {**self._begun, "content": content}
        chat, options = [*self._messages, answer], self._prompt.template_options
        return render(self._tokenizer, chat, opens_answer=False, options=options)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _common_start(self) -> tuple[str, list[int]]:
        """The start of every row, up to the last special token, as text and token ids.

        Whether text after that token gives the same ids alone as in its place is tried.
        """
        tried = [self._rendered(answer) for answer in ("ok", " ok", "\nno", "")]
        start = _common_text(tried)
        ends = [
            start.rfind(token) + len(token)
            for token in self._tokenizer.get_added_vocab()
            if token in start
        ]
        start = start[: max(ends, default=0)]
        ids = self._encode(start)
        for rendered in tried:
            if self._encode(rendered) != [*ids, *self._encode(rendered[len(start) :])]:
                return "", []
        return start, ids


def question_text(prompt: Prompt, messages: Messages | None, texts: Texts) -> str:
    """The prompt's side of a pair."""
    if messages is None:
        return texts.before(prompt)
    return "\n\n".join(_content_text(message["content"]) for message in messages)


def _content_text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


def without_double_start(
    token_ids: list[int], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """`token_ids` with one start token where a text that begins with one was given another."""
    starts = {tokenizer.bos_token_id, tokenizer.cls_token_id} if tokenizer is not None else set()
    while len(token_ids) > 1 and token_ids[0] == token_ids[1] and token_ids[0] in starts:
        token_ids = token_ids[1:]
    return token_ids


def _common_text(texts: Sequence[str]) -> str:
    """Return the longest start that all `texts` have."""
    low, high = min(texts), max(texts)
    length = 0
    while length < min(len(low), len(high)) and low[length] == high[length]:
        length += 1
    return low[:length]
