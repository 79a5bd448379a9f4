"""Chats that come as text or token ids: recognised by the template that rendered them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..prompts import Prompt
from ..prompts.chats import Messages, TemplateOptions

# Contents of a trial chat, which no template prints by itself.
_SYSTEM, _FIRST, _ANSWER, _SECOND = (
    "\ue000s\ue001",
    "\ue000u\ue001",
    "\ue000a\ue001",
    "\ue000v\ue001",
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    opens_answer: bool,
    options: TemplateOptions | None = None,
) -> str:
    """The text of a chat under the tokenizer's template; `opens_answer`: up to a new answer."""
    return str(
        tokenizer.apply_chat_template(
            list(messages), **(options or {}), tokenize=False, add_generation_prompt=opens_answer
        )
    )


class ChatParser:
    """Reads the messages back from a chat that a template rendered.

    What the template writes around contents is taken from a trial chat. A text is recognised only
    if rendering what was read gives that text again.

    Args:
        tokenizer: its chat template is the one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        user = {"role": "user", "content": _FIRST}
        answer = {"role": "assistant", "content": _ANSWER}
        again = {"role": "user", "content": _SECOND}
        system = {"role": "system", "content": _SYSTEM}
        self._turns = self._around([user, answer, again], [_FIRST, _ANSWER, _SECOND])
        self._with_system = self._around([system, user], [_SYSTEM, _FIRST])

    def parse(self, text: str) -> list[dict[str, str]] | None:
        """Return the chat that the template renders, opened for an answer, as `text`."""
        if self._turns is None or not self._turns[-1].strip():
            return None
        head, to_answer, to_user, end = self._turns
        text = self._without_ends(text)
        heads: list[tuple[str, str | None]] = [(self._without_ends(head), None)]
        if self._with_system is not None:
            heads.append((self._without_ends(self._with_system[0]), self._with_system[1]))
        for start, after_system in heads:
            if not text.startswith(start) or not text.endswith(end):
                continue
            body = text[len(start) : len(text) - len(end)]
            messages = []
            if after_system is not None:
                content, found, body = body.partition(after_system)
                if not found:
                    continue
                messages.append({"role": "system", "content": content})
            messages += _split_turns(body, to_answer, to_user)
            if self._gives(messages, text):
                return messages
        return None

    @functools.cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that show a rendered chat: the template's special tokens, else its opening."""
        if self._turns is None:
            return ()
        ends = {self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token}
        written = "".join(self._turns)
        special = [token for token in self.tokenizer.get_added_vocab() if token not in ends]
        found = tuple(token for token in special if token in written)
        opening = self._turns[-1].strip()
        return found or ((opening,) if opening else ())

    def _gives(self, messages: Messages, text: str) -> bool:
        try:
            again = render(self.tokenizer, messages, opens_answer=True)
        except Exception:
            # A template refuses what it does not know: roles that do not take turns, for one.
            return False
        return self._without_ends(again) == text

    def _around(self, messages: Messages, contents: Sequence[str]) -> list[str] | None:
        """Return what the template writes before, between and after `contents`."""
        try:
            rest = render(self.tokenizer, messages, opens_answer=True)
        except Exception:
            return None
        parts = []
        for content in contents:
            if rest.count(content) != 1:
                return None
            before, _, rest = rest.partition(content)
            parts.append(before)
        return [*parts, rest]

    def _without_ends(self, text: str) -> str:
        """`text` without what a tokenizer may have added once more: BOS before, EOS after."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        while bos and text.startswith(bos):
            text = text[len(bos) :]
        while eos and text.endswith(eos):
            text = text[: -len(eos)]
        return text


def _split_turns(body: str, to_answer: str, to_user: str) -> list[dict[str, str]]:
    """The user's and the assistant's messages in turn."""
    messages: list[dict[str, str]] = []
    turns = [("user", to_answer), ("assistant", to_user)]
    while True:
        role, separator = turns[len(messages) % 2]
        content, found, body = body.partition(separator) if separator else (body, "", "")
        messages.append({"role": role, "content": content})
        if not found:
            return messages


class ChatReader:
    """Finds the messages of a prompt, in whatever form it came.

    Args:
        language: the language models' tokenizer.
        own: the reward's.
    """

    def __init__(
        self, language: PreTrainedTokenizerBase | None, own: PreTrainedTokenizerBase | None
    ) -> None:
        self.language = language
        self._tokenizers: list[PreTrainedTokenizerBase] = []
        for tokenizer in (language, own):
            if tokenizer is not None and tokenizer.chat_template:
                self._tokenizers.append(tokenizer)

    def messages(self, prompt: Prompt) -> Messages | None:
        """The chat that `prompt` is; None where it is none, or none that can be read exactly."""
        given: Any = prompt.given
        if not isinstance(given, str):
            is_chat = not given or not isinstance(given[0], int)
            return given if is_chat else None
        for text in self._forms(prompt):
            for parser in self._parsers:
                messages = parser.parse(text)
                if messages is not None:
                    return messages
        return None

    def markers(self, prompt: Prompt) -> tuple[str, ...]:
        """Markers of a template that stand in a prompt which is no chat."""
        if self.messages(prompt) is not None:
            return ()
        texts = self._forms(prompt)
        return tuple(
            dict.fromkeys(
                marker
                for parser in self._parsers
                for marker in parser.markers
                if any(marker in text for text in texts)
            )
        )

    def _forms(self, prompt: Prompt) -> list[str]:
        """The text as it was given, and the one that the language models read."""
        texts = [prompt.given] if isinstance(prompt.given, str) else []
        if self.language is not None and texts:
            texts.append(
                self.language.decode(
                    list(prompt.token_ids),
                    skip_special_tokens=False,
                    clean_up_tokenization_spaces=False,
                )
            )
        return texts

    @functools.cached_property
    def _parsers(self) -> list[ChatParser]:
        return [ChatParser(tokenizer) for tokenizer in self._tokenizers]
