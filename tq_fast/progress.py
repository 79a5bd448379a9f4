"""A progress bar over tokens."""

from __future__ import annotations

from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TokenBar:
    """Context manager: a bar over `num_tokens` tokens, or nothing where it is not visible."""

    def __init__(self, num_tokens: int, *, visible: bool) -> None:
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def num_done(self) -> int:
        """Tokens counted so far."""
        return int(self._bar.tasks[0].completed)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more."""
        self._bar.update(self._task, advance=num_tokens)
