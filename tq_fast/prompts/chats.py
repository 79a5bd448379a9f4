"""Chats: messages brought into one form, and their token ids under a chat template."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidArgument

Messages: TypeAlias = Sequence[Mapping[str, Any]]
TemplateOptions: TypeAlias = Mapping[str, Any]

# Arguments of `apply_chat_template` that are settled here: they change what comes back.
_SETTLED = (
    "add_generation_prompt",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "truncation",
)
# Arguments that no template reads, and that say something about the template or the tokenizer.
_NOT_READ_BY_TEMPLATES = (
    "chat_template",
    "continue_final_message",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
)


def is_message(value: object) -> bool:
    """Whether `value` is one message of a chat."""
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def read_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return a copy of `messages` in which every content is text.

    Text parts (`[{"type": "text", "text": ...}]`) are joined. An assistant without content, as in a
    tool call, has the empty text. What a tool returned may be anything that its template takes.
    Fields that are None are left out, since templates write them as the word None; so is an empty
    assistant turn at the end, since a turn is opened there anyway.

    Raises:
        InvalidArgument: the message names the position of what is wrong, and the part's type.
    """
    read = []
    for idx, message in enumerate(messages):
        entry = {name: copy.deepcopy(field) for name, field in message.items() if field is not None}
        entry["content"] = _read_content(entry, f"message {idx} ({entry['role']})")
        read.append(entry)
    if read[-1] == {"role": "assistant", "content": ""} and len(read) > 1:
        read.pop()
    return read


def _read_content(message: Mapping[str, Any], where: str) -> Any:
    content, role = message.get("content"), message["role"]
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if role in ("tool", "ipython") and content is not None and not _has_parts(content):
        return content
    if not isinstance(content, (list, tuple)):
        raise InvalidArgument(
            f"{where}: content must be text or a list of text parts, got {content!r:.60}"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else part
        if not isinstance(text, str):
            named = f"of type {kind!r}" if isinstance(kind, str) else repr(part)[:60]
            raise InvalidArgument(f"{where}: only text parts can be read, got one {named}")
        texts.append(text)
    return "".join(texts)


def _has_parts(content: Any) -> bool:
    is_list = isinstance(content, (list, tuple))
    return is_list and all(isinstance(part, Mapping) and "type" in part for part in content)


def ends_with_assistant(messages: Messages) -> bool:
    """Whether the last turn is the assistant's, which is then continued.

    Raises:
        InvalidArgument: the last turn is a tool call, which nothing continues.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    if not last["content"] and last.get("tool_calls"):
        raise InvalidArgument(
            "the chat ends with the assistant's tool call, which cannot be continued; the tool's "
            "answer must follow, as a message of role 'tool'"
        )
    return True


def check_template_options(options: Any) -> dict[str, Any]:
    """Return `template_options` as a dict; None is the empty one.

    Raises:
        InvalidArgument: it is no mapping of names, or holds an argument that is settled here.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidArgument(
            "template_options must be a mapping of names, such as {'enable_thinking': False}, "
            f"got {options!r}"
        )
    for name in options:
        if name in _SETTLED:
            raise InvalidArgument(
                f"template_options cannot hold {name!r}: prompts are rendered as token ids of one "
                "chat each, and a turn of the assistant is opened or continued"
            )
    return dict(options)


def unread_options(tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> list[str]:
    """Names in `options` that do not occur in the chat template: they change nothing."""
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    return [
        name
        for name in options
        if name not in _NOT_READ_BY_TEMPLATES and not re.search(rf"\b{name}\b", template)
    ]


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    options: TemplateOptions | None = None,
) -> list[int]:
    """Token ids of a chat under the tokenizer's own template.

    Args:
        tokenizer: has a chat template.
        messages: the chat.
        add_generation_prompt: open a turn of the assistant behind it.
        continue_final_message: leave the last turn open.
        options: further arguments of `apply_chat_template`.

    Raises:
        InvalidArgument: the template refuses the chat, or cannot render it; its reason is named.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            **{**(options or {}), "continue_final_message": continue_final_message},
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
        )
    # A template is a program of its author's: it raises what it likes.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InvalidArgument(f"the chat template cannot render the chat: {reason}") from error
    return list(encoded["input_ids"])
