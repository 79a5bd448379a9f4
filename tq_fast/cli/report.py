"""`tq-fast report`: the pictures and the page of a folder of results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rich.console import Console

from ..errors import InvalidArgument, TqFastError
from ..evaluation.config_file import load_config
from ..evaluation.results import read_records, write_summary, write_text
from ..evaluation.values import describe_heads
from ..jobs.record_file import OutputRefused
from .terminal import say


def run_report(results: Path, console: Console) -> Path:
    """Write `report.html` and `pictures/*.png` into a folder of results; return the page.

    An evaluation that is not finished gives a report of what is there.

    Raises:
        InvalidArgument: the folder holds no results.
        TqFastError: matplotlib is not installed.
        OutputRefused: the folder cannot be written.
    """
    if not (results / "config.toml").is_file():
        raise InvalidArgument(
            f"{str(results)!r} holds no results of tq-fast eval: there is no config.toml in it"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise TqFastError("a report needs matplotlib: pip install 'tq-fast[plots]'")
    # The import needs matplotlib, which the lines above have made sure of.
    from ..evaluation.report import build_report

    config = load_config(results / "config.toml")
    records = read_records(results, config)
    if not any(records.values()):
        raise InvalidArgument(f"{str(results)!r} holds no record yet")
    summary = write_summary(results, config, describe_heads(config, results))
    # The file is written when a run ends, so that an unfinished evaluation may lack it.
    file = results / "versions.json"
    versions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report = build_report(summary, records, versions=versions, config_text=config.text)
    folder = results / "pictures"
    page = results / "report.html"
    try:
        folder.mkdir(exist_ok=True)
        for name, png in report.pictures.items():
            (folder / name).write_bytes(png)
    except OSError as error:
        raise OutputRefused(
            f"pictures cannot be written to {str(folder)!r}: {error.strerror}"
        ) from error
    write_text(page, report.page)
    say(console, f"{len(report.pictures)} pictures in {folder}; the report: {page}")
    return page
