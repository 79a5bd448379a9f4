"""Where the prompts of an evaluation come from: the embedded world, a file, or a data set."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidArgument
from ..models.tiny import load_tiny_world
from .keys import check_keys

_KINDS = ("tiny", "file", "dataset")
_KEYS = (*_KINDS, "limit", "chat", "split", "subset", "column", "remove")


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        kind: "tiny" (held-out prompts of the embedded world), "file" (as for `tq-fast decode`) or
            "dataset" (of the hub, by the `datasets` library).
        name: the file, or the data set.
        limit: how many are taken, the first ones; None: all.
        chat: whether a text is given to the models as a user's message in their chat template.
        split: of a data set.
        subset: of a data set, or None.
        column: of a data set, text or messages (whose first user message is taken).
        remove: texts of a data set's own dialogue format that are taken out of its prompts.
    """

    kind: Literal["tiny", "file", "dataset"]
    name: str
    limit: int | None = None
    chat: bool = False
    split: str = "test"
    subset: str | None = None
    column: str = "prompt"
    remove: tuple[str, ...] = ()

    def read_texts(self) -> list[str]:
        """Prompts of the embedded world or of a data set, as text; the latter may download it.

        Raises:
            InvalidArgument: there is no such data set, split or column.
        """
        if self.kind == "tiny":
            return list(load_tiny_world().prompts[: self.limit])
        datasets = importlib.import_module("datasets")
        try:
            rows = datasets.load_dataset(self.name, self.subset, split=self.split)
        except Exception as error:
            raise InvalidArgument(
                f"prompts: data set {self.name!r} cannot be loaded: {error}"
            ) from error
        if self.column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise InvalidArgument(f"prompts: no column {self.column!r}; columns: {known}")
        rows = rows.select(range(min(len(rows), self.limit or len(rows))))
        texts = [_as_text(value) for value in rows[self.column]]
        for part in self.remove:
            texts = [text.replace(part, "") for text in texts]
        return texts


def read_prompt_source(table: Any, where: str, folder: Path) -> PromptSource:
    """Check the table `[prompts]`; nothing is read but whether a file or library is there."""
    if not isinstance(table, dict):
        raise InvalidArgument(f"{where} must be a table, got {table!r}")
    check_keys(table, _KEYS, where)
    kinds = [kind for kind in _KINDS if kind in table]
    if len(kinds) != 1:
        found = ", ".join(map(repr, kinds)) or "none of them"
        raise InvalidArgument(f"{where} must have one of {', '.join(_KINDS)}, got {found}")
    kind = kinds[0]
    limit = table.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InvalidArgument(f"{where}: limit must be an integer of at least 1, got {limit!r}")
    if kind == "tiny" and table["tiny"] is not True:
        raise InvalidArgument(f"{where}: tiny must be true, got {table['tiny']!r}")
    if kind != "tiny" and not isinstance(table[kind], str):
        raise InvalidArgument(f"{where}: {kind} must be text, got {table[kind]!r}")
    for key in ("split", "subset", "column"):
        if key in table and (kind != "dataset" or not isinstance(table[key], str)):
            raise InvalidArgument(f"{where}: {key} must be text, beside dataset")
    remove = table.get("remove", [])
    is_texts = isinstance(remove, list) and all(isinstance(part, str) for part in remove)
    if not is_texts or (remove and kind != "dataset"):
        raise InvalidArgument(f"{where}: remove must be a list of texts, beside dataset")
    if type(table.get("chat", False)) is not bool:
        raise InvalidArgument(f"{where}: chat must be true or false, got {table['chat']!r}")
    name = "held-out prompts" if kind == "tiny" else table[kind]
    options = {key: table[key] for key in _KEYS if key in table and key not in _KINDS}
    options["remove"] = tuple(remove)
    return PromptSource(kind, str(folder / name) if kind == "file" else name, **options)


def check_readable(source: PromptSource) -> None:
    """Refuse a data set where the library that reads it is not installed."""
    if source.kind == "dataset" and importlib.util.find_spec("datasets") is None:
        raise InvalidArgument(
            "prompts: a data set needs the `datasets` library: pip install 'tq-fast[train]'"
        )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    is_messages = isinstance(value, list) and value and isinstance(value[0], dict)
    texts = [m["content"] for m in value if m.get("role") == "user"] if is_messages else []
    if not texts:
        raise InvalidArgument(f"prompts: a column must hold text or messages, got {value!r:.60}")
    return texts[0]
