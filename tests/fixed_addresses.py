"""Passes at fixed addresses for machines without a GPU: what a graph replays runs one by one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.simulated_device import counted_as_one
from tq_fast.engines import local
from tq_fast.forest import graphs, language
from tq_fast.forest.graphs import Graphs
from tq_fast.presets import drawing

Step = Callable[[], None]


def let_graphs_run(patch: pytest.MonkeyPatch, *, anywhere: bool = True) -> None:
    """Let decodes use graphs on any device, or on none."""
    for module in (graphs, language, local, drawing):
        patch.setattr(module, "has_graphs", lambda device: anywhere)


@contextlib.contextmanager
def fixed_addresses() -> Iterator[list[Graphs]]:
    """Within the block every decode works at fixed addresses; yields what holds its graphs."""
    made: list[Graphs] = []
    begin = Graphs.__init__

    def begun(self: Graphs, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        made.append(self)

    def capture(self: Graphs, step: Step, trial: Step) -> Step:
        return functools.partial(counted_as_one, "graph", step)

    with pytest.MonkeyPatch.context() as patch:
        let_graphs_run(patch)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(Graphs, "__init__", begun)
        patch.setattr(Graphs, "_capture", capture)
        patch.setattr(Graphs, "on_device", lambda self: contextlib.nullcontext())
        yield made


@contextlib.contextmanager
def no_graphs() -> Iterator[None]:
    """Within the block no decode uses graphs, whatever a block around it says."""
    with pytest.MonkeyPatch.context() as patch:
        let_graphs_run(patch, anywhere=False)
        yield
