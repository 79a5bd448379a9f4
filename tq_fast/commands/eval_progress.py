"""How far an evaluation is and how long it will take: a bar, or plain lines now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..evaluation.config import MethodSpec
from .job_progress import format_seconds
from .terminal import say

_LINE_INTERVAL = 10.0
# Work of a response beside that of its candidates: prompts, scoring, bookkeeping.
_FIXED_WORK = 20.0


def work_of(method: MethodSpec) -> float:
    """About how much work a response of `method` is, in roll-out tokens a response token."""
    config = method.config(0)
    if method.method in ("sft", "baseline", "dera"):
        return _FIXED_WORK
    if method.method == "best_of_n":
        return _FIXED_WORK + float(method.own.get("n", 16))
    horizon = 0 if method.method == "args" else config.horizon
    # Without a horizon roll-outs end when the response does, on average half-way.
    length = config.max_new_tokens / 2 if horizon is None else horizon
    rows = config.k * config.rollouts_per_candidate
    factor = 1.4 if method.method == "transfer_q_indirect" else 1.0
    return _FIXED_WORK + factor * rows * (1.0 + length)


class EvalProgress:
    """Context manager that counts responses, each with the work of its method.

    Args:
        console: where to show it.
        pending: responses that this run decodes, by method.
        num_before: responses that were there before.
    """

    def __init__(
        self,
        console: Console,
        pending: Mapping[tuple[int, int], int],
        work: Mapping[tuple[int, int], float],
        num_before: int,
    ) -> None:
        self._console = console
        self._work = dict(work)
        self._total = sum(work[key] * count for key, count in pending.items())
        self._num_total = num_before + sum(pending.values())
        self._num_done = num_before
        self._num_failed = 0
        self._done = 0.0
        self._label = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=self._total)

    def __enter__(self) -> EvalProgress:
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def count(self, key: tuple[int, int], label: str, *, is_failed: bool) -> None:
        """Count one response of method `key`, called `label`."""
        self._num_done += 1
        self._num_failed += is_failed
        self._done += self._work[key]
        self._label = label
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._describe())
        elif time.monotonic() - self._last_line >= _LINE_INTERVAL:
            self._last_line = time.monotonic()
            say(self._console, self._describe())

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_total} responses", self._label]
        # The first responses also pay for loading, and say little about the rest.
        if self._done >= 0.01 * self._total:
            left = (self._total - self._done) * self.seconds / self._done
            parts.append(f"{format_seconds(left)} left")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)
