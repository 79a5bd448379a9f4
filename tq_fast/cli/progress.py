"""Progress of a job: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .terminal import say

# Seconds between two lines where the output is no terminal, and the share of the time so far that
# they become in a long job.
_LINE_INTERVAL, _LINE_SHARE = 10.0, 0.05
# Steps of the decode are measured for so many seconds before anything is said of the time that all
# will take: on a GPU the host runs ahead of the first ones.
_MEASURED_FOR = 5.0
# Where no steps are heard of, the time left is known once this share of the work is done: the first
# responses also pay for prompts and loading, and say little about the rest.
_KNOWN_FROM = 0.02


_Key = TypeVar("_Key")


class _Mark(NamedTuple):
    """How much work was done at a time."""

    seconds: float
    done: float


class JobProgress(Generic[_Key]):
    """Context manager that counts items (prompts or responses), their work and their tokens.

    The time left follows from the work done per second: between the first step that was heard of
    and the last one, which leaves out what came before the first (prompts are encoded, kernels warm
    up or are compiled); without steps, since the start. An item that ends early counts as all of
    its work; one that fails counts as none, since it says nothing of the time that others take.

    Args:
        console: where to show it.
        unit: what the items are called, in the plural.
        work: how much work each item of this run is, by its key.
        num_before: items that were done before this run.
        announces: whether a line says what all will take, as soon as that is known.
        leaves_out: work that no measured step of the first items holds, for that line.
    """

    def __init__(
        self,
        console: Console,
        unit: str,
        work: Mapping[_Key, float],
        *,
        num_before: int = 0,
        announces: bool = False,
        leaves_out: str = "",
    ) -> None:
        self._console = console
        self._unit = unit
        self._work = dict(work)
        self._total = sum(self._work.values())
        # What items hold that are done, and all that was done, items under way included.
        self._ended = self._done = 0.0
        self._num_items = num_before + len(self._work)
        self._num_done = num_before
        self._num_failed = 0
        self._num_tokens = 0
        self._tokens_of: dict[_Key, int] = {}
        self._label = ""
        self._is_announced = not announces
        self._leaves_out = leaves_out
        self._start = self._last_line = time.monotonic()
        self._first_step: _Mark | None = None
        self._last_step: _Mark | None = None
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

    def __exit__(self, *error: object) -> None:
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

    def work(self, amount: float) -> None:
        """Count work of items that are under way."""
        self._done += amount
        self._show()

    def step(self) -> None:
        """Take the time at the end of a step of the work; `work` has counted what it did."""
        mark = _Mark(time.monotonic(), self._done)
        if self._first_step is None:
            self._first_step = mark
        else:
            self._last_step = mark
        self._announce()

    def token(self, key: _Key) -> None:
        """Count one token of the item `key`."""
        self._num_tokens += 1
        self._tokens_of[key] = self._tokens_of.get(key, 0) + 1

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
        self._num_tokens += max(0, num_tokens - counted)
        if is_failed:
            self._num_failed += 1
            self._total -= self._work[key]
            self.restart(())
        else:
            self._ended += self._work[key]
            # Work that is done elsewhere is not heard of before.
            self._done = max(self._done, self._ended)
        self._label = label
        self._announce()
        self._show()

    def restart(self, keys: Iterable[_Key]) -> None:
        """Forget the tokens of items that begin again, and all work under way."""
        for key in keys:
            self._num_tokens -= self._tokens_of.pop(key, 0)
        self._done = self._ended
        # Work is not measured over the time that was lost.
        self._first_step = self._last_step = None

    @property
    def _num_with_work(self) -> int:
        """Items of this run that have not failed."""
        return len(self._work) - self._num_failed

    def _speed(self) -> float | None:
        """The work a second; None where too little was measured."""
        first, last = self._first_step, self._last_step
        if first is not None:
            if last is None or last.seconds - first.seconds < _MEASURED_FOR:
                return None
            speed = (last.done - first.done) / max(1e-9, last.seconds - first.seconds)
            return speed if speed > 0 else None
        if self._done <= 0 or self._done < _KNOWN_FROM * self._total or self.seconds <= 0:
            return None
        return self._done / self.seconds

    def _announce(self) -> None:
        """Say once what all items of this run will take."""
        speed = None if self._is_announced else self._speed()
        if speed is None:
            return
        self._is_announced = True
        num = self._num_with_work
        text = f"{describe_rate(num * 3600 * speed / self._total)} {self._unit} an hour: "
        # Responses that end early make it less; those that have ended are part of the speed.
        text += "about " if self._ended else "at most about "
        text += f"{format_seconds(self._total / speed)} for {num} {self._unit}"
        if self._leaves_out and not self._ended:
            text += f", {self._leaves_out}"
        if self._first_step is not None:
            took = format_seconds(self._first_step.seconds - self._start)
            text += f"; the first step, with prompts and warm-up, took {took}"
        say(self._console, text)

    def _show(self) -> None:
        """Move the bar; without one, print a line if the last one is old enough."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                total=self._total,
                completed=self._done,
                description=self._describe(),
            )
            return
        interval = max(_LINE_INTERVAL, _LINE_SHARE * self.seconds)
        if time.monotonic() - self._last_line >= interval:
            self._last_line = time.monotonic()
            say(self._console, self._describe())

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_items} {self._unit}"]
        if self._label:
            parts.append(self._label)
        if self._num_tokens:
            parts.append(f"{self.rate:.1f} tokens/s")
        speed = self._speed()
        if speed is not None:
            an_hour = self._num_with_work * 3600 * speed / self._total
            parts.append(f"{describe_rate(an_hour)} {self._unit}/h")
            parts.append(f"{format_seconds((self._total - self._done) / speed)} left")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)


def describe_rate(number: float) -> str:
    """Write a number of two digits or more as an integer, a smaller one with a decimal."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def format_seconds(seconds: float) -> str:
    """Write seconds as `12 s`, `3 min 5 s` or `1 h 2 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"
