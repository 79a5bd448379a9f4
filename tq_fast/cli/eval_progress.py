"""How far an evaluation is and how long it will take."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from ..evaluation.config import MethodSpec
from .progress import ProgressLine

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


class EvalProgress(ProgressLine):
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
        super().__init__(console, sum(work[key] * count for key, count in pending.items()))
        self._work = dict(work)
        self._num_total = num_before + sum(pending.values())
        self._num_done = num_before
        self._num_failed = 0
        self._done = 0.0
        self._label = ""

    def count(self, key: tuple[int, int], label: str, *, is_failed: bool) -> None:
        """Count one response of method `key`, called `label`."""
        self._num_done += 1
        self._num_failed += is_failed
        self._done += self._work[key]
        self._label = label
        self._show(self._done)

    def _describe(self) -> str:
        parts = [f"{self._num_done}/{self._num_total} responses", self._label]
        # The first responses also pay for loading.
        parts += self._time_left(self._done, known_from=0.01)
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join(parts)
