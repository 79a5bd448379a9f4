"""`ForestCache`: one prefix KV a tree, one branch KV a row, as a `transformers` cache.

A forest holds G trees. A tree's prefix (prompt and emitted tokens) is stored once, whatever the
number of branches; a row (one roll-out of one candidate of one tree) stores only its own tokens.

    prefix_k, prefix_v   [G, H_kv, P, d] a layer, `prefix_len` [G] of it in use
    branch_k, branch_v   [N, H_kv, S, d] a layer, the same number of tokens in use for every row

Buffers are made once, at the first forward pass, and keep their addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch
from transformers.cache_utils import Cache

from ..errors import UnsupportedModel


@dataclasses.dataclass
class _Layer:
    """KV buffers of one decoder layer."""

    prefix_k: torch.Tensor
    prefix_v: torch.Tensor
    branch_k: torch.Tensor
    branch_v: torch.Tensor
    # The views that `prefix` returned last, and the arguments that they are for.
    _prefix: tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

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
        if rows == slice(0, len(self.branch_k)):
            return self.branch_k, self.branch_v
        return self.branch_k[rows], self.branch_v[rows]

    def grow(self, prefix_capacity: int, branch_capacity: int) -> None:
        """Make room for so many tokens a row and keep those that the buffers hold."""
        if prefix_capacity > self.prefix_k.shape[2]:
            self.prefix_k = _grown(self.prefix_k, prefix_capacity)
            self.prefix_v = _grown(self.prefix_v, prefix_capacity)
            self._prefix = None
        if branch_capacity > self.branch_k.shape[2]:
            self.branch_k = _grown(self.branch_k, branch_capacity)
            self.branch_v = _grown(self.branch_v, branch_capacity)


# Keys and values `[n, H_kv, T, d]` of some rows and tokens, for each layer.
SavedTokens: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


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
    """

    def __init__(
        self, *, num_trees: int, num_rows: int, prefix_capacity: int, branch_capacity: int
    ) -> None:
        super().__init__(layers=[])
        self.num_trees = num_trees
        self.num_rows = num_rows
        self.prefix_capacity = prefix_capacity
        self.branch_capacity = branch_capacity
        self.prefix_len = [0] * num_trees
        self.current_pass: PrefillPass | BranchPass | None = None
        self.current_layer: _Layer | None = None
        self._kv: dict[int, _Layer] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all KV buffers."""
        return sum(
            buffer.nbytes
            for layer in self._kv.values()
            for buffer in (layer.prefix_k, layer.prefix_v, layer.branch_k, layer.branch_v)
        )

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
        num_rows, device = len(tree), tree.device
        assert first_row + num_rows <= self.num_rows, (first_row, num_rows, self.num_rows)
        assert start + num_tokens <= self.branch_capacity, (start, num_tokens)
        prefix_len = torch.tensor(self.prefix_len[: self.num_trees], device=device)
        branch_len = torch.full((num_rows,), start + num_tokens, device=device)
        return BranchPass(
            slice(first_row, first_row + num_rows),
            slice(start, start + num_tokens),
            tree,
            prefix_len,
            branch_len,
            max(self.prefix_len),
        )

    def depth_pass(
        self, *, depth: torch.Tensor, tree: torch.Tensor, prefix_len: torch.Tensor
    ) -> BranchPass:
        """Describe a pass of one token for each row of `tree` `[n]`, known to the device alone.

        The pass reads and writes fixed addresses for as long as `layout` stays the same. `depth`,
        int64 `[1]`, is how many tokens each branch holds already; `prefix_len` is a buffer of the
        caller, for all trees that there were at the beginning.
        """
        num_rows = tree.shape[0]
        return BranchPass(
            slice(0, num_rows),
            depth,
            tree,
            prefix_len,
            (depth + 1).expand(num_rows),
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
        layer = self._kv.get(layer_idx)
        if layer is None:
            layer = self._kv[layer_idx] = self._allocate(key_states, value_states)
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

    def save(self, rows: slice | Sequence[int], start: int, end: int) -> SavedTokens:
        """Copy branch tokens `start` to `end` of `rows`."""
        return [
            (layer.branch_k[rows, :, start:end].clone(), layer.branch_v[rows, :, start:end].clone())
            for layer in self._kv.values()
        ]

    def write(self, row: int, start: int, saved: SavedTokens) -> None:
        """Put the tokens of the one row in `saved` into branch `row`, from token `start` on."""
        for layer, (keys, values) in zip(self._kv.values(), saved, strict=True):
            end = start + keys.shape[2]
            layer.branch_k[row, :, start:end] = keys[0]
            layer.branch_v[row, :, start:end] = values[0]

    def commit(
        self, trees: Sequence[int], rows: Sequence[int], saved: SavedTokens | None = None
    ) -> None:
        """Move the first branch token of `rows[i]` to the prefix of `trees[i]`.

        It is read from `saved`, where that is given, and from the branches otherwise.
        """
        if not trees:
            return
        device = next(iter(self._kv.values())).prefix_k.device
        tree_idx = torch.tensor(trees, device=device)
        row_idx = torch.tensor(rows, device=device)
        start = torch.tensor([self.prefix_len[tree] for tree in trees], device=device)
        if saved is None:
            saved = [(layer.branch_k, layer.branch_v) for layer in self._kv.values()]
        for layer, (keys, values) in zip(self._kv.values(), saved, strict=True):
            at = (tree_idx, slice(None), start)
            layer.prefix_k[at] = keys[row_idx, :, 0]
            layer.prefix_v[at] = values[row_idx, :, 0]
        for tree in trees:
            self.prefix_len[tree] += 1

    def commit_rows(
        self, trees: Sequence[int], rows: Sequence[int], num_tokens: Sequence[int]
    ) -> None:
        """Append the first `num_tokens[i]` branch tokens of `rows[i]` to the prefix of `trees[i]`.

        The branches are much longer here than those of `commit`, and of different lengths.
        """
        for tree, row, num in zip(trees, rows, num_tokens, strict=True):
            start = self.prefix_len[tree]
            for layer in self._kv.values():
                layer.prefix_k[tree, :, start : start + num] = layer.branch_k[row, :, :num]
                layer.prefix_v[tree, :, start : start + num] = layer.branch_v[row, :, :num]
            self.prefix_len[tree] = start + num

    def copy_prefix(self, source: int, tree: int, num_tokens: int) -> None:
        """`tree`, whose prefix is empty, takes over the first `num_tokens` of `source`'s."""
        assert self.prefix_len[tree] == 0 and num_tokens <= self.prefix_len[source]
        for layer in self._kv.values():
            for buffer in (layer.prefix_k, layer.prefix_v):
                buffer[tree, :, :num_tokens] = buffer[source, :, :num_tokens]
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
        for layer in self._kv.values():
            for buffer in (layer.branch_k, layer.branch_v):
                used = buffer[:, :, :num_tokens]
                used[:num_rows] = used.index_select(0, order)

    def drop_tree(self, tree: int) -> None:
        """Take `tree` out of the forest; the last tree takes over its place."""
        last = self.num_trees - 1
        if tree != last:
            num_tokens = self.prefix_len[last]
            for layer in self._kv.values():
                for buffer in (layer.prefix_k, layer.prefix_v):
                    buffer[tree, :, :num_tokens] = buffer[last, :, :num_tokens]
            self.prefix_len[tree] = self.prefix_len[last]
        self.prefix_len.pop()
        self.num_trees = last

    def reserve(self, *, prefix_capacity: int, branch_capacity: int) -> None:
        """Grow the buffers to at least so many tokens a row and keep those that they hold."""
        self.prefix_capacity = max(prefix_capacity, self.prefix_capacity)
        self.branch_capacity = max(branch_capacity, self.branch_capacity)
        for layer in self._kv.values():
            layer.grow(self.prefix_capacity, self.branch_capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; positions are passed to the model explicitly, so nothing reads this."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> _Layer:
        def zeros(like: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
            # Zeros, not empty: a NaN in an unused position would survive a mask (0 * NaN).
            return like.new_zeros(rows, like.shape[1], tokens, like.shape[3])

        return _Layer(
            zeros(key_states, self.num_trees, self.prefix_capacity),
            zeros(value_states, self.num_trees, self.prefix_capacity),
            zeros(key_states, self.num_rows, self.branch_capacity),
            zeros(value_states, self.num_rows, self.branch_capacity),
        )


def _grown(buffer: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, tokens, size = buffer.shape
    grown = buffer.new_zeros(rows, heads, capacity, size)
    grown[:, :, :tokens] = buffer
    return grown
