"""How far a job is, at what rate, and how long it will take: a bar, or plain lines now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Seconds between two lines where the output is no terminal.
_LINE_INTERVAL = 10.0


class JobProgress:
    """Context manager that counts tokens and prompts.

    A prompt counts as `max_new_tokens` tokens of work, and one that ended early as done with all
    of them; the time left follows from the work done per second so far.

    Args:
        console: where to show it.
        num_pending: prompts that this run decodes.
        num_before: prompts that were done before.
        max_new_tokens: most tokens of a response.
    """

    def __init__(
        self, console: Console, *, num_pending: int, num_before: int, max_new_tokens: int
    ) -> None:
        self._console = console
        self._num_prompts = num_pending + num_before
        self._num_done = num_before
        self._num_failed = 0
        self._max_new_tokens = max_new_tokens
        self._num_pending = num_pending
        self._num_tokens = 0
        self._tokens_of: dict[int, int] = {}
        self._work = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            # Gone at the end: the summary says the same.
            self._bar = Progress(*columns, console=console, transient=True)
            total = num_pending * max_new_tokens
            self._task = self._bar.add_task(self._describe(), total=total)

    def __enter__(self) -> JobProgress:
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
    def rate(self) -> float:
        """Tokens a second since the start."""
        return self._num_tokens / max(1e-9, time.monotonic() - self._start)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def token(self, index: int) -> None:
        """Count one token of prompt `index`."""
        self._num_tokens += 1
        self._work += 1
        self._tokens_of[index] = self._tokens_of.get(index, 0) + 1
        self._show()

    def end(self, index: int, *, is_failed: bool) -> None:
        """Count prompt `index` as done."""
        self._num_done += 1
        self._num_failed += is_failed
        self._work += self._max_new_tokens - self._tokens_of.pop(index, 0)
        self._show()

    def restart(self, indices: Iterable[int]) -> None:
        """Forget the tokens of prompts that begin again."""
        for index in indices:
            num_tokens = self._tokens_of.pop(index, 0)
            self._num_tokens -= num_tokens
            self._work -= num_tokens

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._work, description=self._describe())
        elif time.monotonic() - self._last_line >= _LINE_INTERVAL:
            self._last_line = time.monotonic()
            self._console.print(self._describe(), markup=False, highlight=False, soft_wrap=True)

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_prompts} prompts"]
        if self._num_tokens:
            parts.append(f"{self.rate:.1f} tokens/s")
        total = self._num_pending * self._max_new_tokens
        # The first tokens also pay for the prompts, and say little about the rest.
        if self._work >= 0.02 * total > 0:
            left = (total - self._work) * self.seconds / self._work
            parts.append(f"{format_seconds(left)} left")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Seconds as `12 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
