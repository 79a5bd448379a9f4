"""`ForestCache`: what is stored where, without any model."""

from __future__ import annotations

import pytest
import torch

from tq_fast.errors import UnsupportedModel
from tq_fast.forest import ForestCache
from tq_fast.forest.cache import KvShape, PrefillPass

TREES, ROWS, PREFIX, BRANCH = 3, 6, 8, 4
HEADS, SIZE = 2, 5


# Keys and values of one shape in every layer, as `Writer` makes them.
SHAPE = KvShape(HEADS, SIZE, torch.float32, torch.device("cpu"))


@pytest.fixture(params=[None, {0: (SHAPE, SHAPE), 1: (SHAPE, SHAPE)}], ids=["new", "known"])
def cache(request: pytest.FixtureRequest) -> ForestCache:
    """A cache whose layers' shapes are known from another one, and a cache where they are not."""
    return ForestCache(
        num_trees=TREES,
        num_rows=ROWS,
        prefix_capacity=PREFIX,
        branch_capacity=BRANCH,
        shapes=request.param,
    )


def commit(cache: ForestCache, trees: list[int], rows: list[int]) -> None:
    cache.commit(trees, torch.tensor(trees), torch.tensor(rows))


class Writer:
    """Fills a cache with numbers that say where they were written: layer, token id."""

    def __init__(self, cache: ForestCache, num_layers: int = 2) -> None:
        self.cache = cache
        self.num_layers = num_layers

    def prefill(self, tree: int, ids: list[int]) -> None:
        self._write(PrefillPass(tree, 0), torch.tensor([ids]))
        self.cache.prefix_len[tree] = len(ids)

    def branch(self, ids: list[list[int]], start: int) -> None:
        tokens = torch.tensor(ids)
        self._write(
            self.cache.branch_pass(
                tree=torch.arange(len(ids)) // (ROWS // TREES),
                start=start,
                num_tokens=tokens.shape[1],
            ),
            tokens,
        )

    def _write(self, now: object, tokens: torch.Tensor) -> None:
        self.cache.current_pass = now
        for layer in range(self.num_layers):
            keys = tokens[:, None, :, None] + 1000.0 * layer
            keys = keys.expand(-1, HEADS, -1, SIZE).contiguous()
            returned = self.cache.update(keys, -keys, layer)
            assert torch.equal(returned[0], keys)
            assert torch.equal(returned[1], -keys)
            self.cache.take_layer()

    def prefix(self, tree: int) -> list[int]:
        """Ids stored as the prefix of `tree`, the same in every layer, head and component."""
        return self._ids(lambda layer: (layer.prefix_k[tree], layer.prefix_v[tree]))[
            : self.cache.prefix_len[tree]
        ]

    def row(self, row: int) -> list[int]:
        return self._ids(lambda layer: (layer.branch_k[row], layer.branch_v[row]))

    def _ids(self, buffers) -> list[int]:
        found = []
        for idx, layer in self.cache._layers.items():
            keys, values = buffers(layer)
            written = keys != 0
            ids = torch.where(written, keys - 1000.0 * idx, 0.0)
            assert torch.equal(keys, -values)
            assert (ids == ids[:1, :, :1]).all()
            found.append(ids[0, :, 0].int().tolist())
        assert all(ids == found[0] for ids in found)
        return found[0]


@pytest.fixture
def writer(cache: ForestCache) -> Writer:
    writer = Writer(cache)
    for tree, ids in enumerate([[1, 2, 3], [4], [5, 6, 7, 8, 9]]):
        writer.prefill(tree, ids)
    writer.branch([[10], [11], [12], [13], [14], [15]], start=0)
    writer.branch([[20], [21], [22], [23], [24], [25]], start=1)
    return writer


def test_a_prefix_is_stored_once_and_a_branch_by_row(writer: Writer) -> None:
    assert [writer.prefix(tree) for tree in range(3)] == [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert [writer.row(row)[:2] for row in (0, 3, 5)] == [[10, 20], [13, 23], [15, 25]]
    numbers = 2 * 2 * HEADS * SIZE * (TREES * PREFIX + ROWS * BRANCH)
    assert writer.cache.num_bytes == 4 * numbers


def test_commit_moves_the_start_of_a_row_to_the_end_of_a_prefix(writer: Writer) -> None:
    commit(writer.cache, [0, 2], [1, 4])
    assert [writer.prefix(tree) for tree in range(3)] == [
        [1, 2, 3, 11],
        [4],
        [5, 6, 7, 8, 9, 14],
    ]
    commit(writer.cache, [], [])
    writer.cache.commit_rows([0, 1], [2, 3], [1, 2])
    assert writer.prefix(0) == [1, 2, 3, 11, 12]
    assert writer.prefix(1) == [4, 13, 23]


def test_truncate_cuts_a_prefix_that_grows_again_from_there(writer: Writer) -> None:
    writer.cache.truncate(2, 2)
    assert writer.prefix(2) == [5, 6]
    commit(writer.cache, [2], [5])
    assert writer.prefix(2) == [5, 6, 15]


def test_take_rows_moves_what_is_in_use(writer: Writer) -> None:
    writer.cache.take_rows(torch.tensor([3, 0, 2, 1]), 2)
    assert [writer.row(row)[:2] for row in range(6)] == [
        [13, 23],
        [10, 20],
        [12, 22],
        [11, 21],
        [14, 24],
        [15, 25],
    ]


@pytest.mark.parametrize(
    ("dropped", "left"),
    [
        ([0], [[5, 6, 7, 8, 9], [4]]),
        ([2], [[1, 2, 3], [4]]),
        ([1], [[1, 2, 3], [5, 6, 7, 8, 9]]),
        ([2, 0], [[4]]),
        ([1, 0], [[5, 6, 7, 8, 9]]),
    ],
)
def test_the_last_tree_takes_the_place_of_one_that_is_dropped(
    writer: Writer, dropped: list[int], left: list[list[int]]
) -> None:
    for tree in dropped:
        writer.cache.drop_tree(tree)
    assert writer.cache.num_trees == len(left)
    assert [writer.prefix(tree) for tree in range(len(left))] == left


def test_reserve_grows_and_keeps_and_never_shrinks(writer: Writer) -> None:
    before = writer.cache.num_bytes
    writer.cache.reserve(prefix_capacity=2, branch_capacity=2)
    assert writer.cache.num_bytes == before
    writer.cache.reserve(prefix_capacity=PREFIX + 3, branch_capacity=BRANCH + 1)
    assert writer.cache.num_bytes > before
    assert writer.prefix(2) == [5, 6, 7, 8, 9]
    assert writer.row(4)[:2] == [14, 24]
    writer.branch([[30, 31, 32]] * 6, start=2)
    assert writer.row(4) == [14, 24, 30, 31, 32]


def test_reserve_before_the_first_pass_allocates_nothing_and_counts(cache: ForestCache) -> None:
    cache.reserve(prefix_capacity=PREFIX * 2, branch_capacity=1)
    assert cache.num_bytes == 0
    writer = Writer(cache, num_layers=1)
    writer.prefill(0, list(range(1, PREFIX * 2 + 1)))
    assert writer.prefix(0) == list(range(1, PREFIX * 2 + 1))


def test_a_layer_attends_once_to_what_it_stored(cache: ForestCache) -> None:
    cache.current_pass = PrefillPass(0, 0)
    keys = torch.ones(1, HEADS, 2, SIZE)
    cache.update(keys, keys, 0)
    with pytest.raises(UnsupportedModel, match="attention code of its own"):
        cache.update(keys, keys, 1)
    with pytest.raises(UnsupportedModel, match="attention code of its own"):
        cache.check_attended()
    cache.take_layer()
    cache.check_attended()
    with pytest.raises(UnsupportedModel, match="has not just stored"):
        cache.take_layer()
