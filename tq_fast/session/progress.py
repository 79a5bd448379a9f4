"""The progress bar of a decode, which counts tokens."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TokenBar:
    """A context manager with a progress bar over `num_tokens` tokens, shown where `visible`.

    `on_advance(num_tokens)` is called whenever it moves.
    """

    def __init__(
        self, num_tokens: int, visible: bool, on_advance: Callable[[int], None] | None = None
    ) -> None:
        self._on_advance = on_advance
        self._bar = Progress(
            TextColumn("decoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not visible,
        )
        self._task = self._bar.add_task("decoding", total=num_tokens)

    def __enter__(self) -> TokenBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @property
    def num_done(self) -> int:
        """The number of tokens counted so far."""
        return int(self._bar.tasks[0].completed)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens."""
        self._bar.update(self._task, advance=num_tokens)
        if self._on_advance is not None:
            self._on_advance(num_tokens)
