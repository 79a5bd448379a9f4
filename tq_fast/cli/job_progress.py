"""How far a decoding job is, at what rate, and how long it will take."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from .progress import ProgressLine


class JobProgress(ProgressLine):
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
        super().__init__(console, num_pending * max_new_tokens)
        self._num_prompts = num_pending + num_before
        self._num_done = num_before
        self._num_failed = 0
        self._max_new_tokens = max_new_tokens
        self._num_tokens = 0
        self._tokens_of: dict[int, int] = {}
        self._work = 0

    @property
    def rate(self) -> float:
        """Tokens a second since the start."""
        return self._num_tokens / max(1e-9, self.seconds)

    def token(self, index: int) -> None:
        """Count one token of prompt `index`."""
        self._num_tokens += 1
        self._work += 1
        self._tokens_of[index] = self._tokens_of.get(index, 0) + 1
        self._show(self._work)

    def end(self, index: int, *, is_failed: bool) -> None:
        """Count prompt `index` as done."""
        self._num_done += 1
        self._num_failed += is_failed
        self._work += self._max_new_tokens - self._tokens_of.pop(index, 0)
        self._show(self._work)

    def restart(self, indices: Iterable[int]) -> None:
        """Forget the tokens of prompts that begin again."""
        for index in indices:
            num_tokens = self._tokens_of.pop(index, 0)
            self._num_tokens -= num_tokens
            self._work -= num_tokens

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_prompts} prompts"]
        if self._num_tokens:
            parts.append(f"{self.rate:.1f} tokens/s")
        # The first tokens also pay for the prompts.
        parts += self._time_left(self._work, known_from=0.02)
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)
