"""CUDA graphs of what a forest does again and again, captured once for each size.

A forward pass is a few hundred small kernels. Launched one by one from Python they take longer than
the device needs to run them; replayed as a graph, a pass is one launch. Every buffer that a kernel
touches therefore stays at the address that it had when the graph was captured, and what changes
from pass to pass lives on the device.

Graphs live no longer than their forests: they hold the addresses of the KV and of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import warn_caller

if TYPE_CHECKING:
    from .language import Forest


def has_graphs(device: torch.device) -> bool:
    """Whether steps on `device` can be captured."""
    return device.type == "cuda"


class Graphs:
    """The graphs of steps over some forests that are on one device.

    All of them share one pool of memory: what a step writes must have been read before another one
    of these graphs is replayed.

    Args:
        forests: their buffers are at addresses that the graphs hold.
    """

    def __init__(self, forests: Sequence[Forest]) -> None:
        # A forest that knew its graphs, and they it, would hold its KV until Python looks for
        # circles.
        self._forests = [weakref.ref(forest) for forest in forests]
        self.device = forests[0].device
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._layouts = [forest.cache.layout for forest in forests]
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def forests(self) -> list[Forest]:
        """The forests, which are there as long as anybody runs a step over them."""
        found = [known() for known in self._forests]
        assert None not in found, "a forest is gone, and its graphs with it"
        return cast("list[Forest]", found)

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, the current device is that of the forests.

        Kernels, streams and events are those of the current device, which may be another one.
        """
        return torch.cuda.device(self.device)

    def graph(
        self, key: Hashable, step: Callable[[], None], trial: Callable[[], None]
    ) -> Callable[[], None] | None:
        """Return what runs `step` again; None where it cannot be captured, which is warned of once.

        Args:
            key: the graph of another step has another key.
            step: what is captured, once; it is not run.
            trial: runs `step` without lasting effect, as often as it takes to know whether it can
                be captured.
        """
        self.refresh()
        is_refused = any(forest.refuses_graphs for forest in self.forests)
        if key not in self._replays and not is_refused:
            counted = [forest.num_token_forwards for forest in self.forests]
            try:
                self._replays[key] = self._capture(step, trial)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                for forest in self.forests:
                    forest.refuses_graphs = True
                warn_caller(_why_refused(error, self.forests[0].model.config.model_type))
            finally:
                for forest, number in zip(self.forests, counted, strict=True):
                    forest.num_token_forwards = number
        return self._replays.get(key)

    def refresh(self) -> bool:
        """Forget all graphs if a buffer has moved, and return whether one has."""
        layouts = [forest.cache.layout for forest in self.forests]
        has_moved = layouts != self._layouts
        if has_moved:
            self._replays.clear()
            self._layouts = layouts
            # The old pool has no graph any more, but cuBLAS keeps a workspace in it: PyTorch takes
            # no capture into a pool in that state.
            self._pool = torch.cuda.graph_pool_handle()
        return has_moved

    def _capture(self, step: Callable[[], None], trial: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of `step`; the current device is that of the forests."""
        now, aside = torch.cuda.current_stream(), _side_stream(self.device)
        aside.wait_stream(now)
        try:
            with torch.cuda.stream(aside):
                # The first trial compiles kernels and allocates workspaces, for which the host may
                # wait. A capture that meets a wait cannot end, and PyTorch does not recover from
                # that: whether there is one in the model shows in a second trial.
                trial()
                with _refusing_to_wait():
                    trial()
        finally:
            now.wait_stream(aside)
        return _captured(step, pool=self._pool, stream=aside)


def padded_size(num: int, most: int) -> int:
    """Return how many rows a graph has that takes `num` of them, at most `most`.

    There are few sizes, and a quarter of the rows is idle at most.
    """
    step = 1 << max(0, num.bit_length() - 2)
    return min(-(-num // step) * step, most)


@dataclasses.dataclass
class _FixedPass:
    """A forward pass over branches at fixed addresses, of one size.

    Attributes:
        tokens: int64 `[n, T]`.
        tree: int64 `[n]`.
        where: int64 `[T]`, places of the tokens in their branches.
        output: what the module returned; None before the first pass.
        hidden: what its LM head read, where that is kept.
    """

    tokens: torch.Tensor
    tree: torch.Tensor
    where: torch.Tensor
    output: Any = None
    hidden: torch.Tensor | None = None


class PassGraphs:
    """Forward passes of one forest over its branches; a size that comes again is captured.

    Args:
        forest: whose passes are run.
    """

    def __init__(self, forest: Forest) -> None:
        self._graphs = Graphs([forest])
        self._passes: dict[Hashable, _FixedPass] = {}
        self._seen: set[Hashable] = set()

    def run(
        self,
        module: torch.nn.Module,
        tokens: torch.Tensor,
        *,
        start: int,
        tree: torch.Tensor,
        first_row: int,
        **options: Any,
    ) -> Any:
        """Run the pass that `Forest.run_branches` describes; None leaves it to the caller.

        What it returns has the first rows and tokens of `logits` or of `last_hidden_state`. They
        are valid until the next pass of the forest.
        """
        with self._graphs.on_device():
            return self._run(module, tokens, start, tree, first_row, options)

    def _run(
        self,
        module: torch.nn.Module,
        tokens: torch.Tensor,
        start: int,
        tree: torch.Tensor,
        first_row: int,
        options: dict[str, Any],
    ) -> Any:
        (forest,) = self._graphs.forests
        if forest.refuses_graphs:
            return None
        if self._graphs.refresh():
            self._passes.clear()
            self._seen.clear()
        num_rows, num_tokens = tokens.shape
        size = padded_size(num_rows, forest.cache.num_rows - first_row)
        width = padded_size(num_tokens, forest.cache.branch_capacity - start)
        key = (id(module), size, width, first_row, *options)
        if key not in self._seen:
            self._seen.add(key)
            return None
        fixed = self._passes.get(key)
        if fixed is None:
            zeros = tree.new_zeros(size * width + size + width)
            fixed = _FixedPass(
                zeros[: size * width].view(size, width),
                zeros[size * width : size * width + size],
                zeros[size * width + size :],
            )
            self._passes[key] = fixed
        fixed.tokens[:num_rows, :num_tokens] = tokens
        # Rows that only fill the size are of the last tree, and come to the same branches' ends.
        fixed.tree[:] = tree[-1]
        fixed.tree[:num_rows] = tree
        fixed.where[:] = torch.arange(start, start + width, device=forest.device)
        # What lies at the address that graphs read may be of the step before.
        lengths = forest.cache.lengths_on(forest.device)
        step = functools.partial(self._step, module, fixed, lengths, first_row, options)
        replay = self._graphs.graph(key, step, step)
        if replay is None:
            return None
        counted = forest.num_token_forwards
        replay()
        forest.num_token_forwards = counted + tokens.numel()
        if fixed.hidden is not None:
            forest.hidden = fixed.hidden[:num_rows, :num_tokens]
        found = {
            name: fixed.output[name][:num_rows, :num_tokens]
            for name in ("logits", "last_hidden_state")
            if fixed.output.get(name) is not None
        }
        return SimpleNamespace(**found)

    def _step(
        self,
        module: torch.nn.Module,
        fixed: _FixedPass,
        lengths: torch.Tensor,
        first_row: int,
        options: dict[str, Any],
    ) -> None:
        """Run a pass at its fixed addresses."""
        (forest,) = self._graphs.forests
        fixed.output = forest.run_fixed(
            module,
            fixed.tokens,
            where=fixed.where,
            tree=fixed.tree,
            lengths=lengths,
            first_row=first_row,
            **options,
        )
        fixed.hidden = forest.hidden


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Within the block, an operation for which the host waits for the device raises.

    PyTorch has one such mode for all threads; the block is as short as one pass.
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
    """Say why the passes of a model go on without graphs."""
    reason = str(list(_causes(error))[-1])
    # The allocator invalidates a capture when it runs out of memory and frees what it can. Whether
    # it did cannot be told apart here: if so, the launches one by one run out of memory too.
    is_invalidated = "StreamCaptureInvalidated" in reason or "previous error during" in reason
    what = (
        "was not captured, perhaps for want of memory" if is_invalidated else "cannot be captured"
    )
    return (
        f"model type {model_type!r}: a forward pass {what} in a CUDA graph, so that passes are "
        f"launched kernel by kernel: {reason}"
    )


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of captures: cuBLAS keeps a workspace for every stream it ran on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
