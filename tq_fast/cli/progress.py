"""Progress of a job: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .terminal import say

# Seconds between two lines where the output is no terminal.
_LINE_INTERVAL = 10.0
# The time left is shown once this share of the work is done: the first responses also pay for
# prompts and loading, and say little about the rest.
_KNOWN_FROM = 0.02


_Key = TypeVar("_Key")


class JobProgress(Generic[_Key]):
    """Context manager that counts items (prompts or responses), and tokens where `token` is called.

    The time left follows from the work done per second so far. An item that ends early counts as
    all of its work.

    Args:
        console: where to show it.
        unit: what the items are called, in the plural.
        work: how much work each item of this run is, by its key; a token is 1.
        num_before: items that were done before this run.
    """

    def __init__(
        self, console: Console, unit: str, work: Mapping[_Key, float], *, num_before: int = 0
    ) -> None:
        self._console = console
        self._unit = unit
        self._work = dict(work)
        self._total = sum(self._work.values())
        self._done = 0.0
        self._num_items = num_before + len(self._work)
        self._num_done = num_before
        self._num_failed = 0
        self._num_tokens = 0
        self._tokens_of: dict[_Key, int] = {}
        self._label = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            # The bar goes away at the end, because the summary says the same.
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=self._total)

    def __enter__(self) -> JobProgress[_Key]:
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

    @property
    def rate(self) -> float:
        """Tokens a second since the start."""
        return self._num_tokens / max(1e-9, self.seconds)

    def token(self, key: _Key) -> None:
        """Count one token of the item `key`."""
        self._num_tokens += 1
        self._done += 1
        self._tokens_of[key] = self._tokens_of.get(key, 0) + 1
        self._show()

    def end(
        self, key: _Key, *, is_failed: bool = False, label: str = "", num_tokens: int = 0
    ) -> None:
        """Count the item `key` as done.

        Args:
            key: the item.
            is_failed: whether it has no result.
            label: what it belonged to.
            num_tokens: tokens of its result; those that `token` did not count are counted here.
        """
        counted = self._tokens_of.pop(key, 0)
        self._num_done += 1
        self._num_failed += is_failed
        self._num_tokens += max(0, num_tokens - counted)
        self._done += self._work[key] - counted
        self._label = label
        self._show()

    def restart(self, keys: Iterable[_Key]) -> None:
        """Forget the tokens of items that begin again."""
        for key in keys:
            num_tokens = self._tokens_of.pop(key, 0)
            self._num_tokens -= num_tokens
            self._done -= num_tokens

    def _show(self) -> None:
        """Move the bar; without one, print a line if the last one is old enough."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._describe())
        elif time.monotonic() - self._last_line >= _LINE_INTERVAL:
            self._last_line = time.monotonic()
            say(self._console, self._describe())

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_items} {self._unit}"]
        if self._label:
            parts.append(self._label)
        if self._num_tokens:
            parts.append(f"{self.rate:.1f} tokens/s")
        if self._done > 0 and self._done >= _KNOWN_FROM * self._total:
            left = (self._total - self._done) * self.seconds / self._done
            parts.append(f"{format_seconds(left)} left")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Write seconds as `12 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
