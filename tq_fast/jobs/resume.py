"""What the output of a job holds when the job starts, and whether it may go on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .prompt_file import PromptEntry
from .record_file import Line, OutputRefused, RecordFile
from .settings import model_differences, stated_differences


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What the output holds.

    Attributes:
        settings: what the records were made with; None where that is not known.
        kept: the lines that stay, by the index of their prompt.
        failed: indices of kept lines that are error records.
        bad: lines that are no record.
        fingerprints: settings that the records name.
        first_other: least index whose record has another prompt than the prompt file, or None.
    """

    settings: dict[str, Any] | None = None
    kept: dict[int, Line] = dataclasses.field(default_factory=dict)
    failed: set[int] = dataclasses.field(default_factory=set)
    bad: list[Line] = dataclasses.field(default_factory=list)
    fingerprints: set[str] = dataclasses.field(default_factory=set)
    first_other: int | None = None


def read_earlier(
    file: RecordFile, entries: Sequence[PromptEntry], *, retry_errors: bool
) -> Earlier:
    """Read the output; with `retry_errors` its error records count as not there."""
    earlier = Earlier(settings=file.read_settings())
    others: list[int] = []
    for line in file.lines():
        record = line.record
        if record is None:
            earlier.bad.append(line)
            continue
        earlier.fingerprints.add(str(record.get("settings")))
        index = record["index"]
        if not 0 <= index < len(entries) or record.get("prompt") != entries[index].prompt:
            others.append(index)
        elif "error" not in record:
            earlier.failed.discard(index)
            # The record itself may be large, and is not needed again.
            earlier.kept[index] = dataclasses.replace(line, record=None)
        elif not retry_errors and index not in earlier.kept:
            earlier.failed.add(index)
            earlier.kept[index] = dataclasses.replace(line, record=None)
    return dataclasses.replace(earlier, first_other=min(others, default=None))


def check_stated(file: RecordFile, earlier: Earlier, stated: dict[str, Any]) -> None:
    """Refuse to go on with other settings than `stated`, before any model is loaded.

    Raises:
        OutputRefused: the message names what differs; or the file is none of ours.
    """
    if not earlier.fingerprints:
        if earlier.bad and earlier.settings is None:
            raise OutputRefused(
                f"output {str(file.path)!r} exists and holds no record of this command; choose "
                "another output, or --overwrite to lose what it holds"
            )
        return
    differences = []
    if earlier.settings is not None:
        differences = stated_differences(earlier.settings.get("settings", {}), stated)
    if earlier.first_other is not None:
        other = f"the prompt with index {earlier.first_other} is another"
        differences = [text for text in differences if text != "other prompts"] or [other]
    _refuse(file, differences)


def check_models(file: RecordFile, earlier: Earlier, settings: dict[str, Any]) -> None:
    """Refuse to go on with other models, or where records name other settings than these.

    Raises:
        OutputRefused: the message names what differs.
    """
    if not earlier.fingerprints:
        return
    if earlier.settings is not None:
        _refuse(file, model_differences(earlier.settings.get("models", {}), settings["models"]))
    others = earlier.fingerprints - {settings["fingerprint"]}
    if others:
        difference = f"records name settings {min(others)}, these are {settings['fingerprint']}"
        if earlier.settings is None:
            difference += f" ({file.settings_path.name}, which said more, is not there)"
        _refuse(file, [difference])


def describe_repairs(earlier: Earlier) -> list[str]:
    """A sentence for each line that is left out."""
    return [
        f"line {line.number} of the output "
        + ("is no record" if line.is_whole else "was cut off while it was written")
        + "; its prompt is decoded again"
        for line in earlier.bad
    ]


def _refuse(file: RecordFile, differences: Sequence[str]) -> None:
    if differences:
        raise OutputRefused(
            f"output {str(file.path)!r} was made with other settings: {'; '.join(differences)}. "
            "Resume with those it was made with, choose another output, or --overwrite to start "
            "again"
        )
