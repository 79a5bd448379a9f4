"""Worker processes that take turns: the one that is not asked for anything is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class WorkerFailed(RuntimeError):
    """A worker answered with a traceback, or ended."""


class Worker:
    """A process that answers commands, and that gets no CPU between them.

    Args:
        name: for messages.
        command: the process's command line.
        environment: what is set for it beside the environment of this process. Modules are found
            in this checkout, wherever else PYTHONPATH points.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        # Libraries say much while they load; it is shown if the worker fails. `__exit__` closes it.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            # Signals reach the processes that the worker may start, too.
            start_new_session=True,
        )

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the worker's answer to one command.

        Raises:
            WorkerFailed: the command raised in the worker, or the worker ended.
        """
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(f"{self.name} ended at {command!r}; its log:\n{self._log_end()}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}\nits log:\n{self._log_end()}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        # A command that the process did not live to read is written once more when its pipe closes.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _log_end(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]
