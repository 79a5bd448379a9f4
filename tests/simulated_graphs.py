"""CUDA graphs for machines without a GPU: what is captured is remembered and run at each replay.

Streams are names, and operations run at once. What a capture does to PyTorch is what is simulated:
which stream is current, which waits are refused, and what is left behind when a capture fails.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tq_fast.forest import graphs as graphs_module
from tq_fast.forest.graphs import Graphs

WAIT = "called a synchronizing CUDA operation"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


class Stream:
    """A stream of the device 0."""

    device_index = 0

    def wait_stream(self, other: Stream) -> None:
        pass


class SimulatedGraphs:
    """Stands for the parts of torch.cuda that captures use.

    Attributes:
        current: the current stream.
        device: the current device; None outside of every block that sets it.
        devices: the current device at every step, captured, replayed or neither.
        mode: what a wait of the host leads to: 2 where it raises.
        num_started: captures that were begun.
        allocating: pools that the allocator takes to be captured into.
        step_waits: whether the host waits for the device within a step.
        fails_inside: what a step raises while it is captured.
        fails_at_end: what the end of a capture raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.aside = Stream(), Stream()
        self.current, self.mode, self.num_started = self.main, 0, 0
        self.device: torch.device | None = None
        self.devices: list[torch.device | None] = []
        self.allocating: list[Any] = []
        self.step_waits = False
        self.fails_inside: Exception | None = None
        self.fails_at_end: Exception | None = None
        self._captured: Callable[[], None] | None = None
        self._is_capturing = False
        self._num_pools = 0
        for name in ("stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self._new_pool)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", self._set_stream)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self._set_mode)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocation)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None)
        monkeypatch.setattr(graphs_module, "_side_stream", lambda device: self.aside)
        capture = Graphs._capture

        def capture_here(graphs: Graphs, *steps: Callable[[], None]) -> Callable[[], None]:
            return capture(graphs, *(functools.partial(self.run, step) for step in steps))

        monkeypatch.setattr(Graphs, "_capture", capture_here)

    def run(self, step: Callable[[], None]) -> None:
        """Run `step` as the device does: within a capture it is remembered only."""
        self.devices.append(self.device)
        if self._is_capturing:
            self._captured = step
            if self.fails_inside is not None:
                raise self.fails_inside
            return
        if self.step_waits and self.mode == 2:
            raise RuntimeError(WAIT)
        step()

    def _new_pool(self) -> tuple[int, int]:
        self._num_pools += 1
        return 0, self._num_pools

    def _set_stream(self, stream: Stream) -> None:
        self.current = stream

    def _set_mode(self, mode: int | str) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore

    def _end_allocation(self, device: int, pool: Any) -> None:
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to this pool")
        self.allocating.remove(pool)

    @contextlib.contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextlib.contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _graph(
        self, graph: _Graph, *, pool: Any, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        """As torch.cuda.graph: a capture that does not end leaves its stream and its pool open."""
        before, self.current = self.current, stream
        self.num_started += 1
        self.allocating.append(pool)
        self._is_capturing = True
        try:
            yield
        finally:
            self._is_capturing = False
            if self.fails_at_end is not None:
                raise self.fails_at_end
            self.allocating.remove(pool)
            self.current = before
            assert self._captured is not None, "nothing was captured"
            graph.captured = functools.partial(self.run, self._captured)


class _Graph:
    captured: Callable[[], None] | None = None

    def replay(self) -> None:
        assert self.captured is not None, "a graph that was not captured"
        self.captured()
