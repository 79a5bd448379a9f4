"""The speed limits of this machine, measured in the run whose figures are set against them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from tq_fast.forest.huge_pages import ask_for_huge_pages
from tq_fast.ops import few_rows_linear


@dataclasses.dataclass(frozen=True)
class Machine:
    """The bytes that this machine reads and the FLOPs that it does in a second."""

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that must be read from memory and computed."""

    bytes_read: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        """Return the seconds of reading or of computing, whichever takes longer."""
        return max(self.reading(machine), self.flops / machine.flops_per_second)

    def reading(self, machine: Machine) -> float:
        """Return the seconds of reading alone."""
        return self.bytes_read / machine.bytes_per_second


@functools.cache
def measure_machine(dtype: torch.dtype) -> Machine:
    """Read a large buffer in huge pages, and multiply; the fastest round is the ceiling."""
    buffer = torch.empty(1 << 27, dtype=torch.float32)
    ask_for_huge_pages([buffer])
    buffer.fill_(1)
    reading = _least_seconds(lambda: buffer.sum())
    rates = []
    for rows, size, columns in ((1024, 2048, 2048), (512, 768, 2048), (256, 2048, 768)):
        left, right = torch.randn(rows, size).to(dtype), torch.randn(columns, size).to(dtype)
        # The fastest product of any kind is the ceiling, so our own kernel takes part.
        for product in (linear, few_rows_linear):
            seconds = _least_seconds(lambda p=product, x=left, w=right: p(x, w))
            rates.append(2 * rows * size * columns / seconds)
    return Machine(buffer.nbytes / reading, max(rates))


def _least_seconds(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
