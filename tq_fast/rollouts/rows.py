"""Which row of the caches holds each roll-out, from one forward pass to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .state import RolloutState


class RowMap:
    """The roll-outs that go on, the active ones, and the rows of their next forward pass.

    The active roll-outs are the first of the state, in the order of their rows and so of their
    trees. Either each has a row of its own and those that are finished keep the rows behind, or
    equal ones share a row and those that are finished have none.

    `split`, `compact` and `join` return what is to be moved in every cache, an order for
    `ForestCache.take_rows`, or None where each row stays where it is.

    Args:
        state: all roll-outs; this map puts them in order.
        row_of: int64 `[N]`, ascending, the row of each roll-out; None gives each a row of its own.
        num_rows: rows that `row_of` names.

    Attributes:
        state: all roll-outs.
        row_of: int64 `[n]`, ascending, the row of each active roll-out.
        leaders: int64 `[R]`, one active roll-out of each row.
    """

    def __init__(
        self, state: RolloutState, row_of: torch.Tensor | None = None, num_rows: int = 0
    ) -> None:
        self.state = state
        if row_of is None:
            self._keep(len(state.keys))
        else:
            self._share(row_of, num_rows)

    def _keep(self, num_active: int) -> None:
        """The first roll-outs are active, each in a row of its own."""
        self.row_of = self.leaders = torch.arange(num_active, device=self.state.keys.device)

    def _share(self, row_of: torch.Tensor, num_rows: int) -> None:
        rows = torch.arange(num_rows, device=row_of.device)
        self.row_of, self.leaders = row_of, torch.searchsorted(row_of, rows)

    @property
    def num_active(self) -> int:
        """Roll-outs that go on."""
        return len(self.row_of)

    @property
    def is_shared(self) -> bool:
        """Whether any two roll-outs share a row."""
        return len(self.leaders) < len(self.row_of)

    @property
    def tree(self) -> torch.Tensor:
        """Tree of each row, int64 `[R]`, ascending."""
        return self.state.tree[self.leaders]

    def tokens(self, depth: int) -> torch.Tensor:
        """Token at `depth` of each row, int64 `[R]`."""
        return self.state.tokens[self.leaders, depth]

    def split(self, depth: int) -> torch.Tensor | None:
        """Part roll-outs of one row that drew different tokens at `depth`; finished ones leave."""
        state, num = self.state, self.num_active
        drawn = self.row_of << 32 | state.tokens[:num, depth]
        order = state.running_first(drawn)
        drawn = drawn[order[: state.count_running(num)]]
        state.permute(order)
        rows, row_of = torch.unique_consecutive(drawn, return_inverse=True)
        self._share(row_of, len(rows))
        source = rows >> 32
        return None if _is_identity(source) else source

    def compact(self, most_idle: float = 0.25) -> torch.Tensor | None:
        """Finished roll-outs leave once they are `most_idle` of the active ones.

        A forward pass costs little less with a few rows fewer, and moving rows costs a copy of
        their KV.
        """
        num = self.num_active
        is_full = self.state.count_running(num) > (1 - most_idle) * num
        return None if is_full else self._gather(num)

    def join(self, origins: Sequence[int]) -> torch.Tensor | None:
        """Let finished roll-outs, by their places at the beginning, run again in their rows."""
        self.state.finished[self.state.places[origins]] = False
        return self._gather(len(self.state.keys))

    def _gather(self, num: int) -> torch.Tensor | None:
        """Activate those of the first `num` roll-outs that run, and no other."""
        assert not self.is_shared, "finished roll-outs have no rows where some are shared"
        order = self.state.running_first(self.state.tree[:num])
        self._keep(self.state.count_running(num))
        if _is_identity(order):
            return None
        self.state.permute(order)
        return order


def _is_identity(order: torch.Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))
