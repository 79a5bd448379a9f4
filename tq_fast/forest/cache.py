"""`ForestCache`: one prefix KV a tree, one branch KV a row, as a `transformers` cache.

A forest holds G trees. A tree's prefix (prompt and emitted tokens) is stored once, whatever the
number of branches; a row (one roll-out of one candidate of one tree) stores only its own tokens.

    prefix   [S, G, H_kv, P, d], `prefix_len` [G] of it in use
    branch   [S, N, H_kv, B, d], the same number of tokens in use for every row

The S slots are the keys and the values of all layers of one shape, so that what is done to every
layer (a token that moves to the prefix, rows that change places) is one operation. Buffers are made
once, at the first forward pass, and keep their addresses.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from transformers.cache_utils import Cache

from ..copies import upload
from ..errors import UnsupportedModel
from .huge_pages import ask_for_huge_pages


class KvShape(NamedTuple):
    """What the keys, or the values, of one token are in one layer."""

    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(states: torch.Tensor) -> KvShape:
        """The shape of new keys or values `[rows, H_kv, T, d]`."""
        return KvShape(states.shape[1], states.shape[3], states.dtype, states.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of one token."""
        return self.heads * self.size * self.dtype.itemsize


# Of each layer, by its index: the shapes of its keys and of its values.
LayerShapes: TypeAlias = Mapping[int, tuple[KvShape, KvShape]]


class _Pool:
    """The keys and values of one shape, a slot for those of each layer."""

    def __init__(
        self, shape: KvShape, *, num_slots: int, trees: int, rows: int, prefix: int, branch: int
    ) -> None:
        def zeros(*sizes: int) -> torch.Tensor:
            buffer = torch.empty(sizes, dtype=shape.dtype, device=shape.device)
            ask_for_huge_pages([buffer])
            # A NaN in an unused position would survive a mask (0 * NaN).
            return buffer.zero_()

        self.prefix = zeros(num_slots, trees, shape.heads, prefix, shape.size)
        self.branch = zeros(num_slots, rows, shape.heads, branch, shape.size)
        self.num_taken = 0

    def take_slot(self) -> int:
        """Return the number of a slot that no layer has yet."""
        self.num_taken += 1
        return self.num_taken - 1

    def grow(self, prefix_capacity: int, branch_capacity: int) -> None:
        """Make room for so many tokens a row and keep those that the buffers hold."""
        if prefix_capacity > self.prefix.shape[3]:
            self.prefix = _grown(self.prefix, prefix_capacity)
        if branch_capacity > self.branch.shape[3]:
            self.branch = _grown(self.branch, branch_capacity)


class _Layer:
    """Views of the slots that hold the keys and the values of one decoder layer."""

    def __init__(self, keys: tuple[_Pool, int], values: tuple[_Pool, int]) -> None:
        self._slots = keys, values
        self.look()

    def look(self) -> None:
        """Take the views again: the buffers have moved."""
        (pool_k, slot_k), (pool_v, slot_v) = self._slots
        self.prefix_k, self.prefix_v = pool_k.prefix[slot_k], pool_v.prefix[slot_v]
        self.branch_k, self.branch_v = pool_k.branch[slot_k], pool_v.branch[slot_v]
        # The views that `prefix` and `branches` returned last, and the arguments that they are for.
        self._prefix: tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._branches: tuple[slice, tuple[torch.Tensor, torch.Tensor]] | None = None

    def prefix(self, num_trees: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `num_tokens` keys and values of the first `num_trees` trees."""
        asked = num_trees, num_tokens
        if self._prefix is None or self._prefix[0] != asked:
            views = (
                self.prefix_k[:num_trees, :, :num_tokens],
                self.prefix_v[:num_trees, :, :num_tokens],
            )
            self._prefix = asked, views
        return self._prefix[1]

    def branches(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the branches `rows`, with all tokens that they can hold."""
        if self._branches is None or self._branches[0] != rows:
            self._branches = rows, (self.branch_k[rows], self.branch_v[rows])
        return self._branches[1]


# Keys and values `[S, n, H_kv, T, d]` of some rows and tokens, for each pool.
SavedTokens: TypeAlias = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PrefillPass:
    """One forward pass over the prompt of one tree, `[1, T]`, from token `start` on."""

    tree: int
    start: int


@dataclasses.dataclass(frozen=True)
class BranchPass:
    """One forward pass over T new tokens of some rows.

    Attributes:
        rows: the rows of this pass, n of them one after the other.
        where: places of the new tokens in their branches; a tensor (int64 `[T]`) where only the
            device knows them.
        tree: tree of each row, int64 `[n]`, ascending.
        prefix_len: prefix tokens of each tree, int64 `[G]`; trees without rows may be among them.
        branch_len: branch tokens of each row after the pass, int64 `[n]`.
        max_prefix: no prefix is longer.
    """

    rows: slice
    where: slice | torch.Tensor
    tree: torch.Tensor
    prefix_len: torch.Tensor
    branch_len: torch.Tensor
    max_prefix: int


class ForestCache(Cache):  # type: ignore[misc]  # transformers has no types here
    """KV of G prefixes and N branches of one model.

    Args:
        num_trees: G, trees at most.
        num_rows: N, rows at most.
        prefix_capacity: tokens that a prefix can hold.
        branch_capacity: tokens that a branch can hold.
        shapes: of the layers, as another cache of the same model found them; None where they are
            not known yet, so that the slots of each layer are buffers of their own.
    """

    def __init__(
        self,
        *,
        num_trees: int,
        num_rows: int,
        prefix_capacity: int,
        branch_capacity: int,
        shapes: LayerShapes | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.num_trees = num_trees
        self.num_rows = num_rows
        self.prefix_capacity = prefix_capacity
        self.branch_capacity = branch_capacity
        self.prefix_len = [0] * num_trees
        self.current_pass: PrefillPass | BranchPass | None = None
        self.current_layer: _Layer | None = None
        # Layers that are still to come, by the shapes of their keys and values.
        every = [shape for layer in (shapes or {}).values() for shape in layer]
        self._expected = Counter(every)
        self._layers: dict[int, _Layer] = {}
        self._pools: list[tuple[KvShape, _Pool]] = []
        # `prefix_len` as the device has it, and the numbers that were sent there.
        self._lengths: torch.Tensor | None = None
        self._sent: list[int] = []
        self._num_trees_at_first = num_trees
        self.shapes: dict[int, tuple[KvShape, KvShape]] = {}

    def begin(self, num_trees: int) -> None:
        """Hold that many empty trees, at most as many as at first."""
        assert num_trees <= self._num_trees_at_first
        self.num_trees = num_trees
        self.prefix_len = [0] * num_trees

    def fits(
        self, num_trees: int, num_rows: int, prefix_capacity: int, branch_capacity: int
    ) -> bool:
        """Whether the buffers hold as much."""
        return (
            num_trees <= self._num_trees_at_first
            and num_rows <= self.num_rows
            and prefix_capacity <= self.prefix_capacity
            and branch_capacity <= self.branch_capacity
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all KV buffers."""
        return sum(pool.prefix.nbytes + pool.branch.nbytes for _, pool in self._pools)

    def lengths_on(self, device: torch.device) -> torch.Tensor:
        """`prefix_len` on `device`, int64, at an address that never changes.

        It is as long as the forest had trees at first; trees that were taken out have length 0.
        The host does not wait.
        """
        now = [*self.prefix_len, *[0] * (self._num_trees_at_first - len(self.prefix_len))]
        if self._lengths is None:
            self._lengths = torch.zeros(len(now), dtype=torch.int64, device=device)
        if now != self._sent:
            self._lengths.copy_(upload(device, torch.tensor(now))[0])
            self._sent = now
        return self._lengths

    @property
    def layout(self) -> tuple[int, int]:
        """Changes whenever the buffers move; a tree that is taken out moves none."""
        return self.prefix_capacity, self.branch_capacity

    def branch_pass(
        self,
        *,
        tree: torch.Tensor,
        start: int,
        num_tokens: int,
        first_row: int = 0,
    ) -> BranchPass:
        """Describe a pass of `num_tokens` new tokens for rows of the trees `tree` `[n]`.

        They are the rows from `first_row` on, and hold `start` tokens already.
        """
        num_rows = len(tree)
        assert first_row + num_rows <= self.num_rows, (first_row, num_rows, self.num_rows)
        assert start + num_tokens <= self.branch_capacity, (start, num_tokens)
        branch_len = torch.full((num_rows,), start + num_tokens, device=tree.device)
        return BranchPass(
            slice(first_row, first_row + num_rows),
            slice(start, start + num_tokens),
            tree,
            self.lengths_on(tree.device)[: self.num_trees],
            branch_len,
            max(self.prefix_len),
        )

    def fixed_pass(
        self, *, where: torch.Tensor, tree: torch.Tensor, lengths: torch.Tensor, first_row: int = 0
    ) -> BranchPass:
        """Describe a pass for each row of `tree` `[n]` whose places the device alone knows.

        The pass reads and writes fixed addresses for as long as `layout` stays the same.

        Args:
            where: places of the new tokens in their branches, int64 `[T]`, one behind the other.
            tree: tree of each row, ascending.
            lengths: what `lengths_on` returned.
            first_row: of the rows.
        """
        num_rows = tree.shape[0]
        return BranchPass(
            slice(first_row, first_row + num_rows),
            where,
            tree,
            lengths,
            (where[-1:] + 1).expand(num_rows),
            self.prefix_capacity,
        )

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values `[rows, H_kv, T, d]` where the current pass puts them."""
        self.check_attended()
        layer = self._layers.get(layer_idx)
        if layer is None:
            layer = self._layers[layer_idx] = self._allocate(layer_idx, key_states, value_states)
        now = self.current_pass
        if isinstance(now, PrefillPass):
            end = now.start + key_states.shape[2]
            layer.prefix_k[now.tree, :, now.start : end] = key_states[0]
            layer.prefix_v[now.tree, :, now.start : end] = value_states[0]
        else:
            assert isinstance(now, BranchPass), "a forward pass outside of the forest"
            for buffer, states in ((layer.branch_k, key_states), (layer.branch_v, value_states)):
                if isinstance(now.where, slice):
                    buffer[now.rows, :, now.where] = states
                else:
                    buffer[now.rows].index_copy_(2, now.where, states)
        self.current_layer = layer
        return key_states, value_states

    def holds(self, num_layers: int) -> bool:
        """Whether the buffers of that many layers are there."""
        return len(self._layers) == num_layers

    def views(self, now: BranchPass) -> tuple[list[torch.Tensor], ...]:
        """Of each layer, what the pass `now` attends to.

        Returns:
            Keys and values of the prefixes `[G, H_kv, P, d]` and of the branches `[n, H_kv, B, d]`.
        """
        num_trees = now.prefix_len.shape[0]
        parts = [
            (*layer.prefix(num_trees, now.max_prefix), *layer.branches(now.rows))
            for _, layer in sorted(self._layers.items())
        ]
        return tuple(map(list, zip(*parts, strict=True)))

    def take_layer(self) -> _Layer:
        """The layer whose keys were stored last, for its attention; once only.

        Raises:
            UnsupportedModel: a layer attends to keys that it did not store itself.
        """
        layer, self.current_layer = self.current_layer, None
        if layer is None:
            raise UnsupportedModel(
                "a layer attends to keys and values that it has not just stored (it shares those "
                "of another layer, or attends twice), which the shared-prefix cache does not honour"
            )
        return layer

    def check_attended(self) -> None:
        """Refuse a layer that stored its keys and then attended by itself, without the prefix."""
        if self.current_layer is not None:
            raise UnsupportedModel(
                "a layer has attention code of its own, beside the attention interface of "
                "transformers through which the shared-prefix cache works"
            )

    def save(self, rows: slice, start: int, end: int) -> SavedTokens:
        """Copy branch tokens `start` to `end` of `rows`."""
        return [pool.branch[:, rows, :, start:end].clone() for _, pool in self._pools]

    def write(self, row: int, start: int, saved: SavedTokens) -> None:
        """Put the tokens of the one row in `saved` into branch `row`, from token `start` on."""
        for (_, pool), tokens in zip(self._pools, saved, strict=True):
            pool.branch[:, row, :, start : start + tokens.shape[3]] = tokens[:, 0]

    def commit(
        self,
        trees: Sequence[int],
        tree: torch.Tensor,
        row: torch.Tensor,
        saved: SavedTokens | None = None,
    ) -> None:
        """Move the first branch token of rows `row` to the prefixes of `trees`.

        It is read from `saved`, where that is given, and from the branches otherwise.

        Args:
            trees: the trees; none makes no difference.
            tree: the same, int64 `[n]`, on the device.
            row: the row of each, likewise.
            saved: as `save` returned it.
        """
        if not trees:
            return
        start = self.lengths_on(tree.device)[tree]
        sources = saved or [pool.branch for _, pool in self._pools]
        for (shape, pool), source in zip(self._pools, sources, strict=True):
            at = [index.to(shape.device) for index in (tree, row, start)]
            # Between two indices by tensors stands a slice: the rows come first.
            pool.prefix[:, at[0], :, at[2]] = source[:, at[1], :, 0].movedim(1, 0)
        for idx in trees:
            self.prefix_len[idx] += 1

    def commit_rows(
        self, trees: Sequence[int], rows: Sequence[int], num_tokens: Sequence[int]
    ) -> None:
        """Append the first `num_tokens[i]` branch tokens of `rows[i]` to the prefix of `trees[i]`.

        The branches are much longer here than those of `commit`, and of different lengths.
        """
        for tree, row, num in zip(trees, rows, num_tokens, strict=True):
            start = self.prefix_len[tree]
            for _, pool in self._pools:
                pool.prefix[:, tree, :, start : start + num] = pool.branch[:, row, :, :num]
            self.prefix_len[tree] = start + num

    def copy_prefix(self, source: int, tree: int, num_tokens: int) -> None:
        """`tree`, whose prefix is empty, takes over the first `num_tokens` of `source`'s."""
        assert self.prefix_len[tree] == 0 and num_tokens <= self.prefix_len[source]
        self._move_prefix(source, tree, num_tokens)
        self.prefix_len[tree] = num_tokens

    def truncate(self, tree: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` prefix tokens of `tree`."""
        assert num_tokens <= self.prefix_len[tree]
        self.prefix_len[tree] = num_tokens

    def take_rows(self, order: torch.Tensor, num_tokens: int) -> None:
        """Row i becomes what row `order[i]` was (int64 `[n]`), for the first `num_tokens` tokens.

        `order` may name a row several times, and leave rows out.
        """
        num_rows = order.shape[0]
        for shape, pool in self._pools:
            used = pool.branch[:, :, :, :num_tokens]
            used[:, :num_rows] = used.index_select(1, order.to(shape.device))

    def drop_tree(self, tree: int) -> None:
        """Take `tree` out of the forest; the last tree takes over its place."""
        last = self.num_trees - 1
        if tree != last:
            self._move_prefix(last, tree, self.prefix_len[last])
            self.prefix_len[tree] = self.prefix_len[last]
        self.prefix_len.pop()
        self.num_trees = last

    def reserve(self, *, prefix_capacity: int, branch_capacity: int) -> None:
        """Grow the buffers to at least so many tokens a row and keep those that they hold."""
        self.prefix_capacity = max(prefix_capacity, self.prefix_capacity)
        self.branch_capacity = max(branch_capacity, self.branch_capacity)
        for _, pool in self._pools:
            pool.grow(self.prefix_capacity, self.branch_capacity)
        for layer in self._layers.values():
            layer.look()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; positions are passed to the model explicitly, so nothing reads this."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _move_prefix(self, source: int, tree: int, num_tokens: int) -> None:
        for _, pool in self._pools:
            pool.prefix[:, tree, :, :num_tokens] = pool.prefix[:, source, :, :num_tokens]

    def _allocate(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> _Layer:
        shapes = self.shapes[layer_idx] = KvShape.of(keys), KvShape.of(values)
        return _Layer(*((pool, pool.take_slot()) for pool in map(self._pool_for, shapes)))

    def _pool_for(self, shape: KvShape) -> _Pool:
        """The pool of `shape` that has a slot left, made where there is none."""
        for known, pool in self._pools:
            if known == shape and pool.num_taken < len(pool.prefix):
                return pool
        pool = _Pool(
            shape,
            num_slots=max(1, self._expected.pop(shape, 1)),
            trees=self.num_trees,
            rows=self.num_rows,
            prefix=self.prefix_capacity,
            branch=self.branch_capacity,
        )
        self._pools.append((shape, pool))
        return pool


def _grown(buffer: torch.Tensor, capacity: int) -> torch.Tensor:
    *sizes, tokens, size = buffer.shape
    grown = buffer.new_zeros(*sizes, capacity, size)
    grown[..., :tokens, :] = buffer
    return grown
