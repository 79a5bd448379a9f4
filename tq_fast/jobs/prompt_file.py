"""Prompts from a file or from standard input: JSON lines, or one text a line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument

_KINDS = ("prompt", "messages", "token_ids")


@dataclasses.dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file.

    Attributes:
        index: its position among the prompts of the file, from 0; empty lines do not count.
        id: what the file calls it, or None.
        prompt: text, chat messages or token ids, as given.
    """

    index: int
    id: str | int | None
    prompt: str | list[Any]


def read_prompt_file(source: str) -> list[PromptEntry]:
    """Return the prompts in the file `source`; "-" is standard input.

    If the first line that is not empty is a JSON object, every line must be one, with "prompt"
    (text), "messages" (chat) or "token_ids", and perhaps "id"; other keys are left alone. Otherwise
    every line is the text of a prompt. Empty lines are skipped.

    Raises:
        InvalidArgument: the file cannot be read, holds no prompt, or has a wrong line (the message
            names it).
    """
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidArgument(
            f"prompts: {source!r} cannot be read: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"prompts: {name} must be UTF-8 text; byte {error.start} is not"
        ) from error
    # Lines end at "\n" alone: splitlines() would cut a prompt at other line separators of Unicode.
    lines = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise InvalidArgument(f"prompts: {name} holds no prompt")
    if not _is_json_object(lines[0][1]):
        return [PromptEntry(index, None, line) for index, (_, line) in enumerate(lines)]
    return [
        _read_object(index, line, f"prompts: {name}, line {number}")
        for index, (number, line) in enumerate(lines)
    ]


def digest_prompts(entries: list[PromptEntry]) -> str:
    """Hash the prompts and their ids, in their order."""
    whole = json.dumps([[entry.id, entry.prompt] for entry in entries], sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_object(index: int, line: str, where: str) -> PromptEntry:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{where} must be a JSON object, got {line.strip()[:60]!r}")
    kinds = [kind for kind in _KINDS if kind in entry]
    if len(kinds) != 1:
        found = ", ".join(map(repr, entry)) or "none"
        raise InvalidArgument(
            f"{where} must have one of the keys 'prompt', 'messages' and 'token_ids'; "
            f"its keys are {found}"
        )
    kind, value, own_id = kinds[0], entry[kinds[0]], entry.get("id")
    expected = str if kind == "prompt" else list
    if not isinstance(value, expected):
        wanted = "text" if kind == "prompt" else "a list"
        raise InvalidArgument(f"{where}: {kind!r} must be {wanted}, got {value!r:.60}")
    # The decoder tells messages from token ids by their looks, with which the key must agree.
    item = {"messages": dict, "token_ids": int}.get(kind)
    if item is not None and not all(type(part) is item for part in value):
        wanted = "messages with 'role' and 'content'" if item is dict else "integers"
        raise InvalidArgument(f"{where}: {kind!r} must be a list of {wanted}, got {value!r:.60}")
    if not isinstance(own_id, (str, int, type(None))):
        raise InvalidArgument(f"{where}: 'id' must be text or an integer, got {own_id!r:.60}")
    try:
        json.dumps([value, own_id], ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InvalidArgument(f"{where} cannot be written as UTF-8 JSON: {error}") from error
    return PromptEntry(index, own_id, value)
