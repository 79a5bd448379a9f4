"""Depths at fixed addresses: on a GPU one CUDA graph each, and a host that never waits.

A depth pushes the last token of every row through the models and draws the next one. What changes
from depth to depth (the depth itself, the tokens drawn, the rows that are finished) lives on the
device, so that a depth can be captured and is one launch (forest/graphs.py).

Finished rows stay where they are, idle, until few enough run for a graph of half the size. The host
learns of that late, without waiting: it reads how many ran a few depths ago, and no more run now.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..forest.graphs import Graphs, padded_size
from ..forest.language import Forest, LanguageForest
from .state import RolloutSampler, RolloutState

# Depths between two looks at how many rows run; each look shows the number of the one before.
_LOOK_EVERY = 8


class DepthGraphs(abc.ABC):
    """Depths over some forests, from the second on, each size captured once.

    Args:
        forests: their rows are the same texts.
        columns: of the state.
        num_tokens: that a row draws, at most.
        keeps_finished: whether rows that are finished keep their KV.

    Attributes:
        state: at fixed addresses, with a place for every row of the forests.
        depth: int64 `[1]`, tokens that the rows have drawn.
        lengths: of the prefixes, one tensor for each forest.
    """

    def __init__(
        self,
        forests: Sequence[Forest],
        *,
        num_tokens: int,
        columns: Sequence[str] = (),
        keeps_finished: bool = False,
    ) -> None:
        self.keeps_finished = keeps_finished
        self.graphs = Graphs(forests)
        self.num_rows = min(forest.cache.num_rows for forest in forests)
        zeros = torch.zeros(self.num_rows, dtype=torch.int64, device=self.graphs.device)
        self.state = RolloutState.begin(
            zeros, zeros + num_tokens, zeros.clone(), num_tokens=num_tokens, columns=columns
        )
        self.lengths = [forest.cache.lengths_on(forest.device) for forest in forests]
        self.depth = torch.ones(1, dtype=torch.int64, device=self.graphs.device)
        self.num_running = torch.zeros(1, dtype=torch.int64, device=self.graphs.device)

    @property
    def forests(self) -> list[Any]:
        """The forests, which whoever runs depths over them holds."""
        return self.graphs.forests

    @abc.abstractmethod
    def advance(self, tokens: torch.Tensor) -> None:
        """Push `tokens` `[n, 1]`, the last ones of the first rows, and draw those at `depth`."""

    def run(
        self,
        state: RolloutState,
        num_depths: int,
        *,
        first: int = 1,
        on_depth: Callable[[], None] = lambda: None,
    ) -> int | None:
        """Go on with rows that have drawn `first` tokens, until all are finished.

        Args:
            state: a row of its own for each, ascending in their trees; changed in place.
            num_depths: no row has more tokens than this.
            first: tokens that each has drawn.
            on_depth: called after every depth.

        Returns:
            Forward passes that were run; None, with nothing changed, where a model cannot be
            captured. A warning says so, once.
        """
        if num_depths <= first:
            return 0
        with self.graphs.on_device():
            return self._run(state, num_depths, first, on_depth)

    def _run(
        self, state: RolloutState, num_depths: int, first: int, on_depth: Callable[[], None]
    ) -> int | None:
        num_rows = self._size_for(len(state.keys))
        self._load(state, first)
        replay = self._graph(num_rows)
        if replay is None:
            return None
        lagged = LaggedCount(self.num_running)
        depth = first
        while depth < num_depths:
            self._replay(replay, num_rows)
            depth += 1
            on_depth()
            if depth % _LOOK_EVERY == 0 and depth < num_depths:
                at_most = lagged.exchange()
                if at_most == 0:
                    break
                smaller = self._size_for(len(state.keys) if at_most is None else at_most)
                if 2 * smaller <= num_rows and (found := self._graph(smaller)) is not None:
                    self._gather_running(num_rows, smaller, depth)
                    num_rows, replay = smaller, found
        # Rows that rested from the start stand behind all others still.
        self.state.copy_to(state)
        return depth - first

    def _size_for(self, num: int) -> int:
        return padded_size(max(8, num), self.num_rows)

    def _graph(self, num_rows: int) -> Callable[[], None] | None:
        step = functools.partial(self._step, num_rows)
        return self.graphs.graph(num_rows, step, functools.partial(self._try_step, num_rows))

    def _step(self, num_rows: int) -> None:
        """Run one depth of the first `num_rows` rows; everything else is read on the device."""
        self.advance(self.state.tokens[:num_rows].index_select(1, self.depth - 1))
        self.num_running.copy_((~self.state.finished[:num_rows]).sum())
        self.depth += 1

    def _replay(self, replay: Callable[[], None], num_rows: int) -> None:
        counted = [forest.num_token_forwards for forest in self.forests]
        replay()
        for forest, number in zip(self.forests, counted, strict=True):
            forest.num_token_forwards = number + num_rows

    def _try_step(self, num_rows: int) -> None:
        """Run a step that moves no row on, since all are marked as finished.

        The depth itself will overwrite the KV and the columns that it writes.
        """
        depth, finished = self.depth.clone(), self.state.finished.clone()
        self.state.finished.fill_(True)
        try:
            self._step(num_rows)
        finally:
            self.depth.copy_(depth)
            self.state.finished.copy_(finished)

    def _load(self, state: RolloutState, first: int) -> None:
        """Copy `state` to the fixed addresses; rows beyond it rest, in the last tree."""
        assert state.tokens.shape[1] <= self.state.tokens.shape[1], "more tokens than rows can hold"
        self.state.finished.fill_(True)
        self.state.tree.copy_(state.tree[-1:])
        state.copy_to(self.state)
        # What lies at the addresses that graphs read may be of the step before.
        for forest in self.forests:
            forest.cache.lengths_on(forest.device)
        self.depth.fill_(first)

    def _gather_running(self, num_rows: int, smaller: int, depth: int) -> None:
        """Move the rows that run, in their order, to the front, where `smaller` have room."""
        order = self.state.running_first(self.state.tree[:num_rows])
        # Finished ones fill the rows that are left over: sorted, trees ascend all the same.
        order[:smaller] = order[:smaller].sort().values
        for forest in self.forests:
            forest.cache.take_rows(order if self.keeps_finished else order[:smaller], depth)
        self.state.permute(order)


class RolloutGraphs(DepthGraphs):
    """The depths of roll-outs.

    Args:
        forest: the baseline; its rows hold the candidates when `run` is called.
        sampler: how roll-outs are drawn.
    """

    def __init__(self, forest: LanguageForest, sampler: RolloutSampler) -> None:
        super().__init__([forest], num_tokens=forest.cache.branch_capacity)
        self.sampler = sampler

    def advance(self, tokens: torch.Tensor) -> None:
        # A candidate lies before the tokens that are drawn.
        (forest,), (lengths,) = self.forests, self.lengths
        tree = self.state.tree[: len(tokens)]
        logits = forest.forward_depth(tokens, depth=self.depth, tree=tree, lengths=lengths)
        self.sampler.advance(logits, self.state, self.depth)


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
