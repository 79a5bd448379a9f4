"""Prompts from a file or from standard input: JSON lines, a JSON array, or one text a line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument

_KINDS = ("prompt", "messages", "token_ids")
# How an object or an array begins, written by JSON or by Python; "[1] see" and "{{x}}" do not.
_JSON_START = re.compile(r"""\s*(\{\s*(["'}]|$)|\[\s*(["'{\]]|$))""")


@dataclasses.dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file.

    Attributes:
        index: its position among the prompts of the file, from 0; empty lines do not count.
        id: what the file calls it, or None.
        prompt: text, chat messages or token ids, as given.
        extra: what else the file says of it, by key.
    """

    index: int
    id: str | int | None
    prompt: str | list[Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_prompt_file(source: str) -> list[PromptEntry]:
    """Return the prompts in the file `source`; "-" is standard input.

    A file that begins like JSON, or is called .json or .jsonl, is JSON: an object a line, or one
    array. Each object has "prompt" (text or chat messages), "messages" or "token_ids", and perhaps
    "id"; where "prompt" and "messages" are both there, the prompt counts. Its other keys are kept.
    An array may hold texts and chats themselves too. In other files every line is the text of a
    prompt. Empty lines are skipped.

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
    is_named_json = Path(name).suffix in (".json", ".jsonl")
    if is_named_json or _looks_like_json(lines[0][1]):
        return _read_json(name, text, lines)
    for number, line in lines:
        # A comment, say, above lines of JSON.
        if _looks_like_json(line) and isinstance(_parse(line), dict):
            raise InvalidArgument(
                f"prompts: {name}, line {lines[0][0]} is not JSON, but line {number} is"
            )
    return [PromptEntry(index, None, line) for index, (_, line) in enumerate(lines)]


def _looks_like_json(line: str) -> bool:
    is_json = isinstance(_parse(line), (dict, list, str))
    return is_json or _JSON_START.match(line) is not None


def _parse(text: str) -> Any:
    """The value of JSON in `text`, NaN and infinite numbers being None; None where it is none."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except ValueError:
        return None


def _read_json(name: str, text: str, lines: list[tuple[int, str]]) -> list[PromptEntry]:
    """The prompts of a JSON array, or of an object a line."""
    try:
        whole = json.loads(text.removeprefix("\ufeff"), parse_constant=lambda name: None)
    except ValueError as error:
        if _parse(lines[0][1]) is None:
            number = getattr(error, "lineno", lines[0][0])
            raise InvalidArgument(
                f"prompts: {name}, line {number} is not JSON: {error}; a file of plain text must "
                "not begin like JSON, nor be called .json or .jsonl"
            ) from error
    else:
        if isinstance(whole, list):
            if not whole:
                raise InvalidArgument(f"prompts: {name} holds no prompt")
            return [
                _read_item(index, item, f"prompts: {name}, item {index}")
                for index, item in enumerate(whole)
            ]
        return [read_entry(0, whole, f"prompts: {name}, line {lines[0][0]}")]
    entries = []
    for index, (number, line) in enumerate(lines):
        where = f"prompts: {name}, line {number}"
        try:
            row = json.loads(line, parse_constant=lambda name: None)
        except ValueError as error:
            raise InvalidArgument(f"{where} is not JSON: {error}") from error
        entries.append(read_entry(index, row, where))
    return entries


def _read_item(index: int, item: Any, where: str) -> PromptEntry:
    """A prompt of an array: an object, or the prompt itself."""
    if isinstance(item, str):
        item = {"prompt": item}
    elif isinstance(item, list) and item:
        item = {"token_ids" if type(item[0]) is int else "messages": item}
    return read_entry(index, item, where)


def digest_prompts(entries: Sequence[PromptEntry]) -> str:
    """Hash the prompts and their ids, in their order."""
    whole = json.dumps([[entry.id, entry.prompt] for entry in entries], sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()


def read_entry(index: int, entry: Any, where: str) -> PromptEntry:
    """Return the prompt in one object of a file.

    Args:
        index: its position.
        entry: what the object holds.
        where: how messages begin.

    Raises:
        InvalidArgument: it is no prompt.
    """
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{where} must be a JSON object, got {json.dumps(entry)[:60]!r}")
    kinds = [kind for kind in _KINDS if kind in entry]
    if len(kinds) != 1 and kinds != ["prompt", "messages"]:
        found = ", ".join(map(repr, entry)) or "none"
        raise InvalidArgument(
            f"{where} must have one of the keys 'prompt', 'messages' and 'token_ids'; "
            f"its keys are {found}"
        )
    kind, own_id = kinds[0], entry.get("id")
    value = _read_value(kind, entry[kind], where)
    if not isinstance(own_id, (str, int, type(None))):
        raise InvalidArgument(f"{where}: 'id' must be text or an integer, got {own_id!r:.60}")
    try:
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InvalidArgument(f"{where} cannot be written as UTF-8 JSON: {error}") from error
    extra = {key: part for key, part in entry.items() if key not in (kind, "id")}
    return PromptEntry(index, own_id, value, extra)


def _read_value(kind: str, value: Any, where: str) -> str | list[Any]:
    """The prompt under the key `kind`, of the type that the key says."""
    if kind == "prompt" and isinstance(value, str):
        return value
    if kind != "prompt" and not isinstance(value, list):
        raise InvalidArgument(f"{where}: {kind!r} must be a list, got {value!r:.60}")
    # The decoder tells messages from token ids by their looks, with which the key must agree.
    item = int if kind == "token_ids" else dict
    if not isinstance(value, list) or not all(type(part) is item for part in value):
        wanted = "integers" if item is int else "messages with 'role' and 'content'"
        wanted = f"text or a list of {wanted}" if kind == "prompt" else f"a list of {wanted}"
        raise InvalidArgument(f"{where}: {kind!r} must be {wanted}, got {value!r:.60}")
    return value
