"""Forests that stay between two decodes of a session, with their buffers and their graphs."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel

from .language import Forest

_Kind = TypeVar("_Kind", bound=Forest)
_Graphs = TypeVar("_Graphs")


class Lease:
    """Says that a forest is in use: whoever works with the forest holds its lease."""


@dataclasses.dataclass
class _Kept:
    key: tuple[Any, ...]
    forest: Forest
    lease: weakref.ReferenceType[Lease]
    graphs: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)


class ForestStore:
    """Opens forests, and opens those again that nobody uses any more.

    A forest is kept only where its passes are CUDA graphs: to capture them takes as long as some
    tokens. Its KV buffers stay as long as the store does.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        # Two threads that decode with one session must not find the same forest free.
        self._lock = threading.Lock()

    def open(
        self,
        kind: type[_Kind],
        model: PreTrainedModel,
        *,
        num_trees: int,
        num_rows: int,
        prefix_capacity: int,
        branch_capacity: int,
        **options: Any,
    ) -> tuple[_Kind, Lease]:
        """Return an empty forest of at least these sizes, and its lease.

        The arguments are those of `kind`. A forest of the same model and options that is too small
        makes room for the new one.
        """
        key = kind, id(model), tuple(sorted(options.items()))
        lease = Lease()
        with self._lock:
            for kept in [k for k in self._kept if k.key == key and k.lease() is None]:
                if kept.forest.fits(num_trees, num_rows, prefix_capacity, branch_capacity):
                    kept.forest.begin(num_trees)
                    kept.lease = weakref.ref(lease)
                    return cast(_Kind, kept.forest), lease
                self._kept.remove(kept)
        forest = kind(
            model,
            num_trees=num_trees,
            num_rows=num_rows,
            prefix_capacity=prefix_capacity,
            branch_capacity=branch_capacity,
            **options,
        )
        if forest.graphs is not None:
            self._kept.append(_Kept(key, forest, weakref.ref(lease)))
        return forest, lease

    def graphs_for(self, forest: Forest, settings: Any, make: Callable[[], _Graphs]) -> _Graphs:
        """Return the graphs over `forest` for equal `settings`, made where there are none."""
        for kept in list(self._kept):
            if kept.forest is forest:
                for known, graphs in kept.graphs:
                    if known == settings:
                        return cast(_Graphs, graphs)
                kept.graphs.append((settings, make()))
                return cast(_Graphs, kept.graphs[-1][1])
        return make()
