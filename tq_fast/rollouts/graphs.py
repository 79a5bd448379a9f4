"""Roll-outs on a GPU: one CUDA graph a depth, at fixed addresses, and a host that never waits.

A depth of the forest is a few hundred small kernels. Launched one by one from Python they take
longer than the device needs to run them; replayed as a graph, a depth is one launch. What changes
from depth to depth (the depth itself, the tokens drawn, the roll-outs that are finished) therefore
lives on the device, and every buffer that a kernel touches stays at the address that it had when
the graph was captured.

Finished rows stay where they are, idle, until few enough run for a graph of half the size. The host
learns of that late, without waiting: it reads how many ran a few depths ago, and no more run now.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import warn_caller
from ..forest.language import LanguageForest
from .state import RolloutSampler, RolloutState

# Depths between two looks at how many roll-outs run; each look shows the number of the one before.
_LOOK_EVERY = 8


class RolloutGraphs:
    """Depths of one forest, from the second on, each size captured once.

    Graphs live no longer than their forest. They hold the addresses of its KV, which a call of
    `decode` gives back at its end, and of the model's weights, which may lie elsewhere by the next.

    Args:
        forest: the baseline; its rows hold the first token of the roll-outs when `run` is called.
        sampler: how roll-outs are drawn.
        captures: False runs the same operations one by one, on any device.
    """

    def __init__(
        self, forest: LanguageForest, sampler: RolloutSampler, *, captures: bool = True
    ) -> None:
        self.forest, self.sampler, self.captures = forest, sampler, captures
        cache, device = forest.cache, forest.device
        keys = torch.zeros(cache.num_rows, dtype=torch.int64, device=device)
        self.state = RolloutState.begin(
            keys, keys + cache.branch_capacity, keys.clone(), num_tokens=cache.branch_capacity
        )
        self.lengths = cache.lengths_on(device)
        self.depth = torch.ones(1, dtype=torch.int64, device=device)
        self.num_running = torch.zeros(1, dtype=torch.int64, device=device)
        self._replays: dict[int, Callable[[], None]] = {}
        self._layout = cache.layout
        self._is_refused = False
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def run(self, state: RolloutState, num_depths: int) -> int | None:
        """Go on with roll-outs that have drawn their first token, until all are finished.

        Args:
            state: of roll-outs that are each in a row of their own, ascending in their trees;
                changed in place.
            num_depths: no roll-out has more tokens than this.

        Returns:
            Forward passes that were run; None, with nothing changed, where the model cannot be
            captured. A warning says so, once.
        """
        if num_depths == 1:
            return 0
        # Kernels, streams and events are those of the current device, which may be another one.
        device = self.forest.device
        with torch.cuda.device(device) if self.captures else contextlib.nullcontext():
            return self._run(state, num_depths)

    def _run(self, state: RolloutState, num_depths: int) -> int | None:
        num_rows = self._size_for(len(state.keys))
        self._load(state)
        if not self._prepare(num_rows):
            return None
        lagged = LaggedCount(self.num_running)
        depth = 1
        while depth < num_depths:
            self._replay(num_rows)
            depth += 1
            if depth % _LOOK_EVERY == 0 and depth < num_depths:
                at_most = lagged.exchange()
                if at_most == 0:
                    break
                smaller = self._size_for(len(state.keys) if at_most is None else at_most)
                if 2 * smaller <= num_rows and self._prepare(smaller):
                    self._gather_running(num_rows, smaller, depth)
                    num_rows = smaller
        # Rows that rested from the start stand behind all roll-outs still.
        self.state.copy_to(state)
        return depth - 1

    def _size_for(self, num: int) -> int:
        """Rows of the graph that takes `num` of them: few sizes, and a quarter idle at most."""
        step = max(8, 1 << max(0, num.bit_length() - 2))
        return min(-(-num // step) * step, self.forest.cache.num_rows)

    def _step(self, num_rows: int) -> None:
        """Run one depth of the first `num_rows` rows; everything else is read on the device."""
        state = self.state
        tokens = state.tokens[:num_rows].index_select(1, self.depth - 1)
        logits = self.forest.forward_depth(
            tokens,
            depth=self.depth,
            tree=state.tree[:num_rows],
            lengths=self.lengths,
        )
        self.sampler.advance(logits, state, self.depth)
        self.num_running.copy_((~state.finished[:num_rows]).sum())
        self.depth += 1

    def _replay(self, num_rows: int) -> None:
        counted = self.forest.num_token_forwards
        self._replays[num_rows]()
        self.forest.num_token_forwards = counted + num_rows

    def _prepare(self, num_rows: int) -> bool:
        """Have a graph of this size; False, and a warning, where there can be none."""
        if self._layout != self.forest.cache.layout:
            self._replays.clear()
            self._layout = self.forest.cache.layout
            # The old pool has no graph any more, but cuBLAS keeps a workspace in it: PyTorch takes
            # no capture into a pool in that state.
            self._pool = torch.cuda.graph_pool_handle() if self.captures else None
        if num_rows not in self._replays and not self._is_refused:
            counted = self.forest.num_token_forwards
            try:
                self._replays[num_rows] = self._capture(num_rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._is_refused = True
                warn_caller(_why_refused(error, self.forest.model.config.model_type))
            finally:
                self.forest.num_token_forwards = counted
        return num_rows in self._replays

    def _capture(self, num_rows: int) -> Callable[[], None]:
        """Return what runs a depth of so many rows; the current device is the model's."""
        if not self.captures:
            return lambda: self._step(num_rows)
        now, aside = torch.cuda.current_stream(), _side_stream(self.forest.device)
        aside.wait_stream(now)
        try:
            with torch.cuda.stream(aside):
                # The first trial compiles kernels and allocates workspaces, for which the host may
                # wait. A capture that meets a wait cannot end, and PyTorch does not recover from
                # that: whether there is one in the model shows in a second trial.
                self._try_step(num_rows)
                with _refusing_to_wait():
                    self._try_step(num_rows)
        finally:
            now.wait_stream(aside)
        step = functools.partial(self._step, num_rows)
        return _captured(step, pool=self._pool, stream=aside)

    def _try_step(self, num_rows: int) -> None:
        """Run a step that moves no roll-out on, since all are marked as finished.

        The depth itself will overwrite the KV that it writes.
        """
        depth, finished = self.depth.clone(), self.state.finished.clone()
        self.state.finished.fill_(True)
        try:
            self._step(num_rows)
        finally:
            self.depth.copy_(depth)
            self.state.finished.copy_(finished)

    def _load(self, state: RolloutState) -> None:
        """Copy `state` to the fixed addresses; rows beyond it rest, in the last tree."""
        assert state.tokens.shape[1] <= self.state.tokens.shape[1], "more tokens than branches hold"
        self.state.finished.fill_(True)
        self.state.tree.copy_(state.tree[-1:])
        state.copy_to(self.state)
        # What lies at the address that graphs read may be of the step before.
        self.forest.cache.lengths_on(self.forest.device)
        self.depth.fill_(1)

    def _gather_running(self, num_rows: int, smaller: int, depth: int) -> None:
        """Move the roll-outs that run, in their order, into the first `smaller` rows."""
        order = self.state.running_first(self.state.tree[:num_rows])
        # Finished ones fill the rows that are left over: sorted, trees ascend all the same.
        order[:smaller] = order[:smaller].sort().values
        self.forest.cache.take_rows(order[:smaller], depth)
        self.state.permute(order)


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Within the block, an operation for which the host waits for the device raises.

    PyTorch has one such mode for all threads; the block is as short as one depth.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(
    step: Callable[[], None], *, pool: Any, stream: torch.cuda.Stream
) -> Callable[[], None]:
    """Capture `step` on `stream` and return its replay.

    Raises:
        RuntimeError: `step` cannot be captured; the current stream is again that of before.
        OutOfMemoryError: likewise, and memory is what it ran out of.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The stream that torch.cuda.graph would take is one for all devices.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        # PyTorch leaves a capture that cannot end with the capture's stream as the current one, and
        # with an allocator that takes it to go on, and so frees nothing any more.
        torch.cuda.set_stream(before)
        # This raises where the allocator knows better.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
            torch._C._cuda_releasePool(before.device_index, pool)
        for cause in _causes(error):
            # The end of a capture hides behind its own error what went wrong within it.
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
        raise
    return graph.replay


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and those that were being handled when it was raised, the first one last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__context__


def _why_refused(error: RuntimeError, model_type: str) -> str:
    """Say why the roll-outs of a model go on without graphs."""
    reason = str(list(_causes(error))[-1])
    # The allocator invalidates a capture when it runs out of memory and frees what it can. Whether
    # it did cannot be told apart here: if so, the launches one by one run out of memory too.
    is_invalidated = "StreamCaptureInvalidated" in reason or "previous error during" in reason
    what = (
        "was not captured, perhaps for want of memory" if is_invalidated else "cannot be captured"
    )
    return (
        f"model type {model_type!r}: a depth of a roll-out {what} in a CUDA graph, so that it is "
        f"launched kernel by kernel: {reason}"
    )


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of captures: cuBLAS keeps a workspace for every stream it ran on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class LaggedCount:
    """A number of the device, read one exchange late so that its copy has long arrived."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number
        is_cuda = number.device.type == "cuda"
        self._copy = torch.empty_like(number, device="cpu", pin_memory=is_cuda)
        # The stream of the number's device, which need not be the current one, makes the copies.
        self._stream = torch.cuda.current_stream(number.device) if is_cuda else None
        self._sent: torch.cuda.Event | None = None
        self._has_sent = False

    def exchange(self) -> int | None:
        """Return what was sent last time, None the first time, and send the number of now."""
        if self._sent is not None:
            self._sent.synchronize()
        before = int(self._copy) if self._has_sent else None
        self._copy.copy_(self._number, non_blocking=True)
        if self._stream is not None:
            self._sent = self._stream.record_event()
        self._has_sent = True
        return before
