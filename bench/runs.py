"""What tables of figures share: the commit that ran, and rows that may fail one by one."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Case = TypeVar("Case")
Row = dict[str, Any]


def commit_id(*, short: bool = False) -> str | None:
    """Return the commit of the working folder; None without git, or outside of a repository."""
    command = ["git", "rev-parse", *(["--short"] if short else []), "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        # A machine that only measures may have no git.
        return None
    return done.stdout.strip() or None


def fill_table(
    cases: Iterable[Case],
    measure: Callable[[Case], Row],
    write: Callable[[list[Row]], Path],
    describe: Callable[[Case], str] = str,
) -> None:
    """Measure every case, and print the table of those that could be measured.

    The table is written after every row, so that a run which is cut off leaves what it has. A case
    that fails is named on stderr with its traceback, and the others go on.

    Raises:
        SystemExit: a case failed; the message says how many, and the exit code is 1.
    """
    rows: list[Row] = []
    failed = []
    table = None
    for case in cases:
        try:
            row = measure(case)
        except Exception:
            failed.append(describe(case))
            sys.stderr.write(f"{failed[-1]} failed:\n{traceback.format_exc()}\n")
            continue
        rows.append(row)
        table = write(rows)
    if table is not None:
        sys.stdout.write(table.read_text())
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows) + len(failed)} rows failed: {failed}")
