"""The output of a job: what survives a stop at any byte, and who may write."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tq_fast.jobs.record_file import Line, OutputRefused, RecordFile


def record(index: int) -> dict[str, Any]:
    # A line separator and a character of several bytes: neither may be mistaken for a line's end.
    return {"index": index, "response": "é\u2028\n" * index, "token_ids": [index]}


def write(path: Path, *indices: int) -> None:
    with RecordFile(path) as file:
        for index in indices:
            file.append(record(index))


def good_lines(file: RecordFile) -> list[Line]:
    return [line for line in file.lines() if line.record is not None]


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 1)
    write(path, 2)
    with RecordFile(path) as file:
        assert [line.record for line in file.lines()] == [record(0), record(1), record(2)]
        assert [line.number for line in file.lines()] == [1, 2, 3]


def test_a_file_cut_at_any_byte_is_repaired_and_loses_no_finished_record(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 1, 2)
    whole = path.read_bytes()
    ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with RecordFile(path) as file:
            lines = list(file.lines())
            kept = [line for line in lines if line.record is not None]
            # A record of which only the newline is missing is finished.
            num_finished = sum(end - 1 <= cut for end in ends)
            assert [line.record["index"] for line in kept] == list(range(num_finished))
            assert all(not line.is_whole for line in lines if line.record is None)
            file.keep(kept)
            for index in range(num_finished, 3):
                file.append(record(index))
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\n",
        b"\n",
        b"\x00\x00\x00\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"index": "1", "token_ids": []}\n',
        b'{"index": 1}\n',
        b'{"index": 1, "token_ids": [1, 2\n',
        b'{"token_ids": []}\n',
    ],
)
def test_a_line_in_the_middle_that_is_no_record_is_left_out(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0, 1)
    first, second, _ = path.read_bytes().split(b"\n")
    # The second record's newline is missing too.
    path.write_bytes(first + b"\n" + garbage + second)
    with RecordFile(path) as file:
        assert [line.number for line in file.lines() if line.record is None] == [2]
        file.keep(good_lines(file))
        file.append(record(2))
    assert read(path) == [record(0), record(1), record(2)]


def test_nothing_kept_is_an_empty_file_and_an_absent_file_stays_absent(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as file:
        assert list(file.lines()) == []
        file.keep([])
        assert not path.exists()
    write(path, 0)
    with RecordFile(path) as file:
        file.keep([])
    assert path.read_bytes() == b""


def test_error_records_are_records(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"index": 3, "error": {"type": "X"}}\n{"index": 4, "error": "X"}\n')
    with RecordFile(path) as file:
        assert [line.record is not None for line in file.lines()] == [True, False]


def test_numbers_that_json_lacks_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as file, pytest.raises(ValueError, match="JSON"):
        file.append({"index": 0, "token_ids": [], "q": float("nan")})
    assert not path.exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as first:
        first.append(record(0))
        with pytest.raises(OutputRefused, match="is being written by another process"):
            RecordFile(path).__enter__()
        # Another output in the same folder is free.
        with RecordFile(tmp_path / "other.jsonl"):
            pass
    with RecordFile(path) as file:
        assert len(good_lines(file)) == 1


def test_settings_come_back_and_a_broken_settings_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as file:
        assert file.read_settings() is None
        file.write_settings({"alpha": 1.0, "long": "x" * 100})
        file.write_settings({"alpha": 0.5})
        assert file.read_settings() == {"alpha": 0.5}
        file.append(record(0))
    with RecordFile(path) as file:
        assert file.read_settings() == {"alpha": 0.5}
    file.settings_path.write_text('{"alpha": ')
    with RecordFile(path) as file:
        assert file.read_settings() is None


def test_a_job_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "out.jsonl") as file:
        file.write_settings({"alpha": 1.0})
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("not ours\n")
    with RecordFile(foreign):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.txt"]


@pytest.mark.parametrize(
    ("name", "reason"), [("missing/out.jsonl", "no such folder"), ("", "it is a folder")]
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(OutputRefused, match=reason):
        RecordFile(tmp_path / name).__enter__()


def test_a_full_disk_is_a_refusal_and_the_cut_record_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 0)
    whole = path.read_bytes()
    written = os.write

    def run_out(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(file, data[:10])

    with RecordFile(path) as file:
        monkeypatch.setattr(os, "write", run_out)
        with pytest.raises(OutputRefused, match="cannot be written: No space left on device"):
            file.append(record(1))
    monkeypatch.undo()
    assert path.read_bytes() != whole
    with RecordFile(path) as file:
        file.keep(good_lines(file))
    assert path.read_bytes() == whole
