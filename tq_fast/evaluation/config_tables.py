"""The parts of a configuration file that stand in many places: models, settings, prompts, names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import DecodeConfig
from ..errors import InvalidArgument, nearest
from .config import MODEL_ROLES, ModelSource
from .prompts import PromptKind, PromptSource

LOADING = (
    *("tokenizer", "reward_tokenizer", "baseline_reward_tokenizer", "reward_index"),
    *("device", "dtype"),
)
_PROMPT_KINDS: tuple[PromptKind, ...] = ("tiny", "tiny_others", "file", "dataset")
_PROMPTS = (*_PROMPT_KINDS, "limit", "chat", "split", "subset", "column", "remove")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")
# A run has its own seed, and one response to each prompt.
_FIXED = ("seed", "num_return_sequences")
DECODE_FIELDS = tuple(f.name for f in dataclasses.fields(DecodeConfig) if f.name not in _FIXED)


def prompt_source(table: Any, where: str, folder: Path) -> PromptSource:
    """Check the table `[prompts]`; no prompt is read."""
    check_keys(as_table(table, where), _PROMPTS, where)
    kinds = [kind for kind in _PROMPT_KINDS if kind in table]
    if len(kinds) != 1:
        found = ", ".join(map(repr, kinds)) or "none of them"
        raise InvalidArgument(f"{where} must have one of {', '.join(_PROMPT_KINDS)}, got {found}")
    kind = kinds[0]
    limit = table.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InvalidArgument(f"{where}: limit must be an integer of at least 1, got {limit!r}")
    given = table[kind]
    if kind == "tiny" and given is not True:
        raise InvalidArgument(f"{where}: tiny must be true, got {given!r}")
    if kind == "tiny_others" and (type(given) is not int or given < 1):
        raise InvalidArgument(f"{where}: tiny_others must be a number of prompts, got {given!r}")
    if not kind.startswith("tiny") and not isinstance(given, str):
        raise InvalidArgument(f"{where}: {kind} must be text, got {given!r}")
    for key in ("split", "subset", "column"):
        if key in table and (kind != "dataset" or not isinstance(table[key], str)):
            raise InvalidArgument(f"{where}: {key} must be text, beside dataset")
    remove = table.get("remove", [])
    is_texts = isinstance(remove, list) and all(isinstance(part, str) for part in remove)
    if not is_texts or (remove and kind != "dataset"):
        raise InvalidArgument(f"{where}: remove must be a list of texts, beside dataset")
    if type(table.get("chat", False)) is not bool:
        raise InvalidArgument(f"{where}: chat must be true or false, got {table['chat']!r}")
    if kind == "tiny_others":
        limit = table["limit"] = min(given, limit or given)
    name = {"tiny": "held-out prompts", "tiny_others": "other prompts"}.get(kind, given)
    options = {key: table[key] for key in _PROMPTS if key in table and key not in _PROMPT_KINDS}
    options["remove"] = tuple(remove)
    return PromptSource(kind, str(folder / name) if kind == "file" else name, **options)


def model_table(table: Any, where: str, folder: Path) -> dict[str, ModelSource | str | int]:
    """Read a table of models and of how they are loaded."""
    check_keys(as_table(table, where), (*MODEL_ROLES, *LOADING), where)
    read: dict[str, ModelSource | str | int] = {}
    for key, value in table.items():
        read[key] = value if key in LOADING else model_source(value, f"{where}, {key}", folder)
    return read


def model_source(value: Any, where: str, folder: Path) -> ModelSource:
    """Read the name of a model, or a table with what is done to it."""
    table = {"name": value} if isinstance(value, str) else as_table(value, where)
    check_keys(table, ("name", "keep", "sparsify_seed"), where)
    name: Any = table.get("name")
    keep: Any = table.get("keep", 1.0)
    seed: Any = table.get("sparsify_seed", 0)
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"{where}: name must be a hub id or a folder, got {name!r}")
    if type(keep) not in (int, float) or not 0.0 < keep <= 1.0:
        raise InvalidArgument(f"{where}: keep must be in (0, 1], got {keep!r}")
    if type(seed) is not int:
        raise InvalidArgument(f"{where}: sparsify_seed must be an integer, got {seed!r}")
    # A relative folder is taken from where the configuration lies.
    name = str(folder / name) if name.startswith("./") or name.startswith("../") else name
    return ModelSource(name, float(keep), seed)


def decode_table(table: Any, where: str) -> dict[str, Any]:
    """Read a table of fields of `DecodeConfig`."""
    check_keys(as_table(table, where), DECODE_FIELDS, where)
    return {key: decode_value(key, value) for key, value in table.items()}


def decode_value(key: str, value: Any) -> Any:
    """Read a setting of decoding."""
    # TOML has no null, so that a word stands for a horizon of None.
    return None if key == "horizon" and value == "none" else value


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        InvalidArgument: the message names the key, and the nearest known one.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise InvalidArgument(f"{where}: unknown key {key!r}; {nearest(key, known)}")


def as_table(value: Any, where: str) -> dict[str, Any]:
    """Return `value`, which must be a table."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where} must be a table, got {value!r}")
    return value


def tables(value: Any, where: str) -> list[dict[str, Any]]:
    """Return `value`, which must be a list of tables."""
    if not is_list_of(value, dict):
        raise InvalidArgument(f"{where} must be a list of at least one table, got {value!r}")
    return value


def is_list_of(value: Any, *kinds: type) -> bool:
    """Return whether `value` is a list of values of these kinds, at least one."""
    return isinstance(value, list) and bool(value) and all(type(item) in kinds for item in value)


def checked_name(name: Any, where: str) -> str:
    """Return `name`, which must be fit for the name of a file."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        expected = "letters, digits and _ . = + -, and begin with a letter or digit"
        raise InvalidArgument(f"{where}: name must consist of {expected}, got {name!r}")
    return name


def check_unique(names: list[str], where: str) -> None:
    """Refuse a name that stands there twice."""
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"{where}: the name {name!r} stands there twice")
