"""Prompts of an evaluation, from the embedded world, a file, or a data set."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from ..errors import InvalidArgument
from ..jobs.prompt_file import PromptEntry, read_prompt_file
from ..models.tiny import load_tiny_world, other_prompts

PromptKind: TypeAlias = Literal["tiny", "tiny_others", "file", "dataset"]


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """A source of prompts.

    Attributes:
        kind: "tiny" (held-out prompts of the embedded world), "tiny_others" (prompts of the same
            kind that are not among those), "file" (as for `tq-fast decode`) or "dataset" (of the
            hub, by the `datasets` library).
        name: the file, or the data set.
        limit: how many are taken, the first ones; None: all.
        chat: whether a text is given to the models as a user's message in their chat template.
        split: of a data set.
        subset: of a data set, or None.
        column: of a data set, text or messages (whose first user message is taken).
        remove: texts of a data set's own dialogue format that are taken out of its prompts.
    """

    kind: PromptKind
    name: str
    limit: int | None = None
    chat: bool = False
    split: str = "test"
    subset: str | None = None
    column: str = "prompt"
    remove: tuple[str, ...] = ()

    def read(self) -> list[PromptEntry]:
        """Return the prompts, numbered from 0; a data set may be downloaded.

        Raises:
            InvalidArgument: they cannot be read, or there are none; there is no such data set,
                split or column.
        """
        if self.kind == "file":
            return read_prompt_file(self.name)[: self.limit]
        texts: Sequence[str]
        if self.kind == "tiny":
            texts = load_tiny_world().prompts[: self.limit]
        elif self.kind == "tiny_others":
            texts = self._read_others()
        else:
            texts = self._read_data_set()
        if not texts:
            raise InvalidArgument(f"prompts: {self.name!r} holds none")
        return [PromptEntry(index, None, text) for index, text in enumerate(texts)]

    def _read_others(self) -> Sequence[str]:
        try:
            return other_prompts(self.limit or 1)
        except ValueError as error:
            raise InvalidArgument(f"prompts: tiny_others: {error}") from error

    def _read_data_set(self) -> Sequence[str]:
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
