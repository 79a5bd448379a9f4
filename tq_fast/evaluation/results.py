"""The folder of results of an evaluation: records, summary, tables, and what it ran with."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import _native
from .._version import __version__
from ..jobs.record_file import OutputRefused, RecordFile
from .config import EvalConfig, MethodSpec, SetupSpec
from .summary import summarise, write_table
from .work import Record


def records_path(output: Path, setup: SetupSpec, method: MethodSpec) -> Path:
    """Where the records of a method lie."""
    return output / "records" / setup.name / f"{method.name}.jsonl"


def read_records(output: Path, config: EvalConfig) -> dict[tuple[str, str], list[Record]]:
    """The records of every (set-up, method) in a folder of results; one an index, no cut lines."""
    records: dict[tuple[str, str], list[Record]] = {}
    for setup in config.setups:
        for method in setup.methods:
            file = RecordFile(records_path(output, setup, method))
            by_index: dict[int, Record] = {}
            for line in file.lines():
                record = line.record
                is_better = record is not None and (
                    "error" not in record or record["index"] not in by_index
                )
                if is_better:
                    by_index[record["index"]] = record
            records[(setup.name, method.name)] = [by_index[index] for index in sorted(by_index)]
    return records


def write_summary(output: Path, config: EvalConfig) -> dict[str, Any]:
    """Compute the summary of the records, write it with its tables, and return it."""
    summary = summarise(config, read_records(output, config))
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(output / "table.md", write_table(summary))
    return summary


def write_run(output: Path, workers: int, *, responses: int, seconds: float) -> None:
    """Write what this run was made with, and add it to the runs of the folder.

    Args:
        output: the folder.
        workers: processes.
        responses: that this run decoded.
        seconds: wall time.
    """
    path = output / "versions.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    runs.append(
        {
            "finished": time.strftime("%Y-%m-%d", time.gmtime()),
            "workers": workers,
            "responses": responses,
            "wall_seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
        }
    )
    versions = {
        "tq_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _native.cpu_name(),
        "cores": os.cpu_count(),
        "runs": runs,
    }
    write_text(path, json.dumps(versions, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go.

    Raises:
        OutputRefused: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputRefused(f"output {str(path)!r} cannot be written: {error.strerror}") from error
