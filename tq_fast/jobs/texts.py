"""Whole texts in the records of an earlier job, to which a value head can be fitted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from .record_file import Record
from .resume import model_differences


@dataclasses.dataclass(frozen=True)
class RecordedTexts:
    """The texts that a job drew for one prompt.

    Attributes:
        index: position of the prompt in its file.
        prompt: text, chat messages or token ids, as given.
        sequences: token ids of each text.
        rewards: one a text; None where the job scored none.
    """

    index: int
    prompt: Any
    sequences: list[list[int]]
    rewards: list[float] | None


def read_texts(path: Path) -> list[RecordedTexts]:
    """Return the texts in the file of records `path`, by the index of their prompts.

    Records of errors are left out, and lines that are no records.

    Raises:
        InvalidArgument: there is no such file, or it holds no texts.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidArgument(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    found: dict[int, RecordedTexts] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        texts = _texts_of(record) if isinstance(record, dict) else None
        if texts is not None:
            found[texts.index] = texts
    if not found:
        raise InvalidArgument(f"records {str(path)!r} hold no texts that a head can be fitted to")
    return [found[index] for index in sorted(found)]


def check_texts(path: Path, models: Mapping[str, Any], source: str) -> None:
    """Refuse the records `path` unless they hold texts that `source` drew.

    Args:
        path: the file of records; the settings beside it say what they were made with.
        models: `model_settings` of those that the texts will be read with.
        source: role of the model that has drawn them.

    Raises:
        InvalidArgument: they are the records of another method, source or model.
    """
    beside = path.with_name(path.name + ".settings.json")
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
        stated, then = settings["settings"], settings["models"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(
            f"records {str(path)!r} were made with nobody knows what: {str(beside)!r} cannot be "
            f"read: {error}"
        ) from error
    method = stated.get("method")
    drawn_from = stated.get("source") if method == "best_of_n" else method
    if drawn_from != source or stated.get("strategy") != "sample":
        how = "transfer_q" if method is None else method
        how += f" with source={drawn_from!r}" if method == "best_of_n" else ""
        raise InvalidArgument(
            f"records {str(path)!r} must be those of best_of_n with source={source!r}, or of "
            f"sampling by the method {source!r}; they were made by {how}"
        )
    roles = [role for role in (source, "reward") if role in then]
    differences = model_differences(
        {role: then[role] for role in roles}, {role: models.get(role) for role in roles}
    )
    if differences:
        raise InvalidArgument(
            f"records {str(path)!r} were made with other models: {'; '.join(differences)}"
        )


def _texts_of(record: Record) -> RecordedTexts | None:
    """Return the texts of a record; None where it is an error, or no record."""
    index, sequences, rewards = record.get("index"), [], []
    if not isinstance(index, int) or "prompt" not in record or "token_ids" not in record:
        return None
    for response in (record, *record.get("other_responses", ())):
        if "stages" in response:
            (stage,) = response["stages"]
            sequences += stage["sequences"]
            rewards += stage["rewards"]
        else:
            sequences.append(response["token_ids"])
    is_scored = len(rewards) == len(sequences)
    return RecordedTexts(index, record["prompt"], sequences, rewards if is_scored else None)
