"""The output of a job: JSON lines that survive being stopped at any moment.

A record is one line, written by one call and forced to the disk before the next prompt goes on.
What a stop left behind is found again at the next start: a record cut in half, at the end, is cut
off; a line in the middle that is no record is left out. Beside the file `OUT.jsonl` stands
`OUT.jsonl.settings.json`, which says what the records were made with, and whose lock keeps a second
process away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import TqFastError

# One JSON object: the response to a prompt, or the error that it met (records.py makes them).
Record: TypeAlias = dict[str, Any]


class OutputRefused(TqFastError):
    """The output file cannot be written, or belongs to another job; it was left alone."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the file.

    Attributes:
        number: from 1.
        start: offset of its first byte.
        end: offset after its last byte, the newline included.
        is_whole: whether it ends with a newline.
        record: what it holds, or None where that is no record.
    """

    number: int
    start: int
    end: int
    is_whole: bool
    record: Record | None


class RecordFile:
    """Context manager: the records of one job, open for this process alone.

    Nothing in the file changes before `keep`, `clear` or `append`.

    Args:
        path: the JSONL file; it need not exist.

    Raises:
        OutputRefused: the file cannot be written, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_path = path.with_name(path.name + ".settings.json")
        self._file = -1
        self._lock = -1

    def __enter__(self) -> RecordFile:
        if self.path.is_dir() or not self.path.parent.is_dir():
            reason = "it is a folder" if self.path.is_dir() else "there is no such folder"
            raise OutputRefused(f"output {str(self.path)!r} cannot be written: {reason}")
        try:
            with self._writing():
                self._lock = _lock_file(self.settings_path)
        except BlockingIOError:
            raise OutputRefused(
                f"output {str(self.path)!r} is being written by another process; wait for it or "
                "choose another output"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file >= 0:
            os.close(self._file)
        # The settings go away with a job that never began or wrote no record: it leaves nothing.
        if os.fstat(self._lock).st_size == 0 or not self.path.exists():
            self.settings_path.unlink(missing_ok=True)
        os.close(self._lock)

    def read_settings(self) -> dict[str, Any] | None:
        """Return what the records were made with; None where it is not known."""
        data = os.pread(self._lock, os.fstat(self._lock).st_size, 0)
        with contextlib.suppress(ValueError):
            settings = json.loads(data)
            if isinstance(settings, dict):
                return settings
        return None

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Replace what `read_settings` returns."""
        # The file is written in place, because its lock would not follow a rename.
        with self._writing():
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(settings, indent=2).encode() + b"\n", 0)
            os.fsync(self._lock)

    def lines(self) -> Iterator[Line]:
        """Iterate over the lines of the file, each with its record if it holds one."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            start = 0
            for number, data in enumerate(file, start=1):
                end = start + len(data)
                yield Line(number, start, end, data.endswith(b"\n"), _read_record(data))
                start = end

    def keep(self, lines: list[Line]) -> None:
        """Drop everything but `lines`, which stand in the order of the file."""
        if not self.path.exists():
            return
        starts = [0, *(line.end for line in lines[:-1])]
        with self._writing():
            if any(line.start != start for line, start in zip(lines, starts, strict=False)):
                self._copy(lines)
                return
            end = lines[-1].end if lines else 0
            if end < self.path.stat().st_size:
                os.truncate(self.path, end)
            if lines and not lines[-1].is_whole:
                self._write(b"\n")

    def append(self, record: Record) -> None:
        """Write one record; it is on the disk when this returns."""
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._writing():
            self._write(data)

    def _copy(self, lines: list[Line]) -> None:
        """Put a file that holds `lines` alone in the place of this one, in one go."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as old, temporary.open("wb") as new:
            for line in lines:
                old.seek(line.start)
                new.write(old.read(line.end - line.start).removesuffix(b"\n") + b"\n")
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(self.path)
        _sync_folder(self.path.parent)

    def _write(self, data: bytes) -> None:
        if self._file < 0:
            is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if is_new:
                _sync_folder(self.path.parent)
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the system (disk full, no permission) into a refusal."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise OutputRefused(
                f"output {str(self.path)!r} cannot be written: {error.strerror}; records that are "
                "finished are kept"
            ) from error


def _read_record(data: bytes) -> Record | None:
    """Return the record in a line: an object with an index, and a response or an error."""
    try:
        record = json.loads(data)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("index")) is not int:
        return None
    is_response = isinstance(record.get("token_ids"), list)
    return record if is_response or isinstance(record.get("error"), dict) else None


def _lock_file(path: Path) -> int:
    """Open `path`, which may be new, and lock it; BlockingIOError where another process did."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another job may have removed the file after it was opened here; then try again.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
