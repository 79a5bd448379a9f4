"""Captures of graphs, simulated (tests/simulated_graphs.py): those that fail leave no trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tq_fast
from tests.fixed_addresses import let_graphs_run
from tests.simulated_graphs import INVALIDATED, WAIT, SimulatedGraphs
from tests.test_speed_options import NONE, assert_same, language_model, run
from tq_fast.config import SpeedOptions
from tq_fast.forest.cache import ForestCache
from tq_fast.forest.graphs import Graphs, _captured

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedGraphs:
    return SimulatedGraphs(monkeypatch)


def decode(**options: Any) -> tuple[tq_fast.DecodeResult, list[str]]:
    """Decode with graphs; return what was said of captures beside the result."""
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        let_graphs_run(patch)
        warnings.simplefilter("always")
        result = run(language_model(scale=2.0), SpeedOptions(), num_rollouts=4, **options)
    return result, [str(w.message) for w in caught if "CUDA graph" in str(w.message)]


def plain(**options: Any) -> tq_fast.DecodeResult:
    return run(language_model(scale=2.0), NONE, num_rollouts=4, **options)


def test_captured_depths_give_the_tokens_of_separate_launches(cuda: SimulatedGraphs) -> None:
    ours, said = decode()
    assert cuda.num_started and not said
    assert_same(ours, plain())


def test_a_finished_prompt_costs_no_graph(cuda: SimulatedGraphs) -> None:
    """Slots are not refilled where roll-outs run to the end: trees are taken out one by one."""
    dropped = []
    drop = ForestCache.drop_tree

    def note(cache: ForestCache, tree: int) -> None:
        dropped.append(cuda.num_started)
        drop(cache, tree)

    sizes: list[tuple[int, ...]] = []  # of the rows, and of the buffers that graphs point into
    prepare = Graphs._capture

    def count(graphs: Graphs, step: Any, trial: Any) -> Any:
        cache = graphs.forests[0].cache
        sizes.append((step.args[0], cache.prefix_capacity, cache.branch_capacity))
        return prepare(graphs, step, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForestCache, "drop_tree", note)
        patch.setattr(Graphs, "_capture", count)
        ours, said = decode(horizon=None)
    assert not said and any(num_started for num_started in dropped)
    assert len(sizes) == len(set(sizes)) == cuda.num_started
    assert_same(ours, plain(horizon=None))


def test_all_depths_run_on_the_device_of_the_model(cuda: SimulatedGraphs) -> None:
    """The current device is another one, and kernels would be launched there."""
    decode()
    assert len(cuda.devices) > 6 and set(cuda.devices) == {torch.device("cpu")}
    assert cuda.device is None


def test_no_capture_starts_where_the_host_would_wait(cuda: SimulatedGraphs) -> None:
    cuda.step_waits = True
    ours, said = decode()
    assert cuda.num_started == 0
    assert len(said) == 1 and "cannot be captured" in said[0] and WAIT in said[0]
    assert cuda.current is cuda.main and cuda.mode == 0
    assert_same(ours, plain())


def test_a_mode_that_the_caller_has_set_is_set_again(cuda: SimulatedGraphs) -> None:
    cuda.mode = 1
    decode()
    assert cuda.mode == 1


def test_a_capture_that_cannot_end_leaves_stream_and_allocator_as_they_were(
    cuda: SimulatedGraphs,
) -> None:
    cuda.fails_inside = RuntimeError("operation not permitted when stream is capturing")
    cuda.fails_at_end = RuntimeError(INVALIDATED)
    ours, said = decode()
    assert cuda.num_started == 1
    assert cuda.current is cuda.main and not cuda.allocating
    assert len(said) == 1 and "cannot be captured" in said[0] and "not permitted" in said[0]
    assert_same(ours, plain())


def test_memory_that_ends_within_a_capture_is_reported_as_such(cuda: SimulatedGraphs) -> None:
    cuda.fails_inside = torch.OutOfMemoryError("no room for the graph")
    cuda.fails_at_end = RuntimeError(INVALIDATED)
    with pytest.raises(torch.OutOfMemoryError, match="no room for the graph"):
        _captured(lambda: cuda.run(lambda: None), pool=(0, 1), stream=cuda.aside)  # type: ignore
    assert cuda.current is cuda.main and not cuda.allocating


def test_a_capture_that_the_allocator_invalidates_is_not_laid_on_the_model(
    cuda: SimulatedGraphs,
) -> None:
    cuda.fails_at_end = RuntimeError(INVALIDATED)
    ours, said = decode()
    assert len(said) == 1 and "want of memory" in said[0]
    assert "cannot be captured" not in said[0]
    assert_same(ours, plain())
