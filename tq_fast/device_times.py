"""Times of phases on GPUs, by events at their borders.

The host hands work to a GPU and goes on, so its clock says when a phase was handed over, not how
long it took. An event that is recorded on the stream notes when the GPU gets there. Nobody waits
for it before the decode has ended: what is over is added up on the way, the rest then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch

_gpus: ContextVar[tuple[torch.device, ...]] = ContextVar("tq_fast_timed_gpus", default=())


@contextlib.contextmanager
def timing_on(gpus: Sequence[torch.device]) -> Iterator[None]:
    """Within the block, borders of phases are marked on `gpus`, in this thread."""
    token = _gpus.set(tuple(gpus))
    try:
        yield
    finally:
        _gpus.reset(token)


def mark() -> tuple[torch.cuda.Event, ...]:
    """Record an event on the current stream of every GPU that is timed; empty without one."""
    events = []
    for gpu in _gpus.get():
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(gpu))
        events.append(event)
    return tuple(events)


class Interval(NamedTuple):
    """One run of the phase `name`, between two marks."""

    name: str
    begin: tuple[torch.cuda.Event, ...]
    end: tuple[torch.cuda.Event, ...]

    def is_over(self) -> bool:
        """Whether every GPU has passed the end; nobody waits."""
        return all(event.query() for event in self.end)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until every GPU has passed the end."""
        for event in self.end:
            event.synchronize()

    def seconds(self) -> float:
        """The time of the GPU that took longest, once the interval is over."""
        pairs = zip(self.begin, self.end, strict=True)
        return max(begin.elapsed_time(end) for begin, end in pairs) / 1e3
