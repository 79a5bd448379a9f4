"""How far something long is: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .terminal import say

# Seconds between two lines where the output is no terminal.
_LINE_INTERVAL = 10.0

_Line = TypeVar("_Line", bound="ProgressLine")


class ProgressLine:
    """Context manager; what derives from it counts, and says what there is to say.

    Args:
        console: where to show it.
        total: work there is to do, in any unit.
    """

    def __init__(self, console: Console, total: float) -> None:
        self._console = console
        self._total = total
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            # Gone at the end: the summary says the same.
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self: _Line) -> _Line:
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=self._describe())
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

    def _show(self, done: float) -> None:
        """Show that so much of the work is done, where it is time to."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._describe())
        elif time.monotonic() - self._last_line >= _LINE_INTERVAL:
            self._last_line = time.monotonic()
            say(self._console, self._describe())

    def _describe(self) -> str:
        raise NotImplementedError

    def _time_left(self, done: float, *, known_from: float) -> list[str]:
        """The time left, once that share of the work is done: what came first says little."""
        if not done or done < known_from * self._total:
            return []
        return [f"{format_seconds((self._total - done) * self.seconds / done)} left"]


def format_seconds(seconds: float) -> str:
    """Seconds as `12 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
