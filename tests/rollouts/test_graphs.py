"""Roll-outs at fixed addresses: the same tokens, nothing moves, and nobody waits for the device.

A graph itself needs a GPU (tests/gpu/test_rollout_graphs.py). What it replays runs here one by one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tq_fast
from tests import zoo
from tests.fixed_addresses import fixed_addresses, no_graphs
from tests.test_speed_options import (
    ARCHITECTURES,
    ENDS,
    NONE,
    PROMPTS,
    VOCAB,
    assert_same,
    language_model,
    run,
)
from tq_fast.config import SpeedOptions
from tq_fast.engines import local
from tq_fast.forest import language
from tq_fast.forest.graphs import Graphs
from tq_fast.forest.language import LanguageForest
from tq_fast.rollouts.graphs import LaggedCount, RolloutGraphs
from tq_fast.rollouts.state import RolloutSampler

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")

Making = Callable[[RolloutGraphs], None]


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RolloutGraphs]]:
    """Within the test every decode works at fixed addresses; yields what ran its roll-outs."""
    made: list[RolloutGraphs] = []

    def opened(*args: Any) -> RolloutGraphs:
        made.append(RolloutGraphs(*args))
        return made[-1]

    monkeypatch.setattr(local, "RolloutGraphs", opened)
    with fixed_addresses():
        yield made


def plain(baseline: Any, speed: SpeedOptions, **options: Any) -> tq_fast.DecodeResult:
    """`run` without graphs, whatever the fixture has patched."""
    with no_graphs():
        return run(baseline, speed, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("horizon", [1, 2, 5, None])
@pytest.mark.parametrize("ends", [ENDS, ()])
@pytest.mark.parametrize(
    "rollout", [{"rollout": "greedy"}, {"num_rollouts": 4, "rollout_top_k": 9}]
)
def test_the_tokens_are_those_without_graphs(
    with_graphs: list[RolloutGraphs],
    architecture: str,
    horizon: int | None,
    ends: tuple[int, ...],
    rollout: dict[str, Any],
) -> None:
    baseline = language_model(architecture, scale=2.0)
    options = {"horizon": horizon, "eos_token_id": ends, **rollout}
    ours = run(baseline, SpeedOptions(), **options)
    assert horizon == 1 or with_graphs[0].depth.item() > 1
    assert_same(ours, plain(baseline, NONE, **options))
    assert ours.stats.rollouts_run == plain(baseline, SpeedOptions(), **options).stats.rollouts_run


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"reward_bounds": (0.0, 1.0)}])
def test_refilled_slots_and_waves_of_a_lazy_choice_use_the_same_buffers(
    with_graphs: list[RolloutGraphs], options: dict[str, Any]
) -> None:
    baseline = language_model(scale=2.0)
    options = {"num_rollouts": 3, "horizon": 3, **options}
    ours = run(baseline, SpeedOptions(), **options)
    assert len(with_graphs) == 1
    without = {name: x for name, x in options.items() if name != "reward_bounds"}
    assert_same(ours, plain(baseline, NONE, **without))


def test_rows_that_still_run_gather_in_a_smaller_graph(
    with_graphs: list[RolloutGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []
    gather = RolloutGraphs._gather_running

    def note(graphs: RolloutGraphs, num_rows: int, smaller: int, depth: int) -> None:
        gathered.append((num_rows, smaller))
        gather(graphs, num_rows, smaller, depth)

    monkeypatch.setattr(RolloutGraphs, "_gather_running", note)
    baseline = language_model()
    options = {"num_rollouts": 8, "horizon": None, "max_new_tokens": 40, "prompts": PROMPTS[:3]}
    ours = run(baseline, SpeedOptions(), **options)
    assert gathered and all(2 * smaller <= num_rows for num_rows, smaller in gathered)
    assert_same(ours, plain(baseline, NONE, **options))


def test_no_buffer_moves_from_step_to_step(
    with_graphs: list[RolloutGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = RolloutGraphs._step
    addresses = []

    def noted(graphs: RolloutGraphs, num_rows: int) -> None:
        step(graphs, num_rows)
        cache = graphs.forests[0].cache
        buffers = [*graphs.state.tensors.values(), *graphs.lengths, graphs.depth]
        layers = cache._layers.values()
        buffers += [
            buffer
            for layer in layers
            for buffer in (layer.prefix_k, layer.prefix_v, layer.branch_k, layer.branch_v)
        ]
        addresses.append(tuple(buffer.data_ptr() for buffer in buffers))

    monkeypatch.setattr(RolloutGraphs, "_step", noted)
    run(language_model(), SpeedOptions(), num_rollouts=2)
    assert len(addresses) > 6 and len(set(addresses)) == 1


class _OneDevice(TorchDispatchMode):
    """Refuses operations between devices: a copy from the host would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.dim() > 0}
        assert len(devices) <= 1, f"{function} works on {devices}"
        return out


def on_meta(architecture: str) -> LanguageForest:
    """Two trees and eight rows of a model on the device "meta", from which nothing can be read."""
    model = zoo.language_model(architecture, vocab_size=VOCAB).to("meta", torch.bfloat16)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to("meta"))
    # The trial run reads what it computes, which here is nothing.
    language.known_shapes[model] = {}
    sizes = {"num_trees": 2, "num_rows": 8, "prefix_capacity": 16, "branch_capacity": 6}
    forest = LanguageForest(model, **sizes, backend="ref", cpu_layers=False)
    forest.prefill(0, [1, 2, 3])
    forest.prefill(1, [1, 2])
    return forest


@pytest.mark.parametrize("architecture", sorted(zoo.LANGUAGE_MODELS))
@pytest.mark.parametrize("rollout", [{"rollout": "greedy"}, {"rollout_top_p": 0.9}])
@torch.no_grad()
def test_the_host_learns_nothing_of_a_depth_and_tells_it_nothing(
    architecture: str, rollout: dict[str, Any]
) -> None:
    forest = on_meta(architecture)
    config = tq_fast.DecodeConfig(k=4, backend="ref", **rollout)
    eos = torch.zeros(1, dtype=torch.int64, device="meta")
    with fixed_addresses():
        graphs = RolloutGraphs(forest, RolloutSampler(eos, VOCAB, config))
    with _OneDevice():
        graphs._step(8)
        graphs._gather_running(8, 4, 1)


@torch.no_grad()
def test_graphs_of_another_layout_share_no_memory_with_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch refuses a capture into a pool that has lost all its graphs."""
    handles, pools = itertools.count(), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(Graphs, "_capture", lambda graphs, *_: pools.append(graphs._pool) or print)
    forest = on_meta("llama")
    eos = torch.zeros(1, dtype=torch.int64, device="meta")
    graphs = RolloutGraphs(forest, RolloutSampler(eos, VOCAB, tq_fast.DecodeConfig()))
    for capacity in (6, 9):
        forest.cache.reserve(prefix_capacity=0, branch_capacity=capacity)
        assert graphs._graph(8) is graphs._graph(4) is print
    assert pools == [0, 0, 1, 1]


def test_what_the_host_reads_or_sends_would_be_noticed() -> None:
    numbers = torch.empty(3, device="meta")
    for reads in (numbers.sum().item, numbers.nonzero, numbers.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reads()
    with pytest.raises(AssertionError, match="works on"), _OneDevice():
        numbers.copy_(torch.zeros(3))


@pytest.mark.parametrize("options", [{"num_rollouts": 4}, {"rollout": "greedy"}])
def test_a_model_that_cannot_be_captured_is_said_once_and_decoded_all_the_same(
    with_graphs: list[RolloutGraphs], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def refuse(graphs: Graphs, *steps: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", refuse)
    baseline = language_model(scale=2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = run(baseline, SpeedOptions(), **options)
    said = [str(w.message) for w in caught if "cannot be captured" in str(w.message)]
    assert len(said) == 1 and "model type 'llama'" in said[0] and "not permitted" in said[0]
    assert_same(ours, plain(baseline, NONE, **options))


def test_running_out_of_memory_in_a_capture_is_not_taken_for_a_refusal(
    with_graphs: list[RolloutGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail_once(graphs: Graphs, step: Any, trial: Any) -> Callable[[], None]:
        tried.append(graphs.forests[0].cache.num_rows)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room for the graph")
        return step

    monkeypatch.setattr(Graphs, "_capture", fail_once)
    baseline = language_model(scale=2.0)
    with pytest.warns(UserWarning, match="out of memory with 5 prompts"):
        ours = run(baseline, SpeedOptions(), num_rollouts=4)
    assert max(tried[1:]) < tried[0]
    assert_same(ours, plain(baseline, NONE, num_rollouts=4))


class _Stream:
    """Stands for a stream: what is enqueued happens when somebody waits for it."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        while self.pending:
            self.pending.pop(0)()


class _Number:
    """Stands for a number on the second GPU; copies of it are enqueued there."""

    device = torch.device("cuda", 1)

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.value = stream, 0


class _Pinned:
    """Stands for pinned memory, which holds nonsense until a copy has arrived."""

    def __init__(self) -> None:
        self.value = -1

    def copy_(self, number: _Number, *, non_blocking: bool) -> None:
        assert non_blocking
        value = number.value
        number.stream.pending.append(lambda: setattr(self, "value", value))

    def __int__(self) -> int:
        return self.value


def test_a_count_is_waited_for_on_the_device_that_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is another one: an event recorded there is ready before the copy is."""
    current, second = _Stream(), _Stream()
    streams = {None: current, _Number.device: second}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[device])
    monkeypatch.setattr(torch, "empty_like", lambda number, *, device, pin_memory: _Pinned())
    number = _Number(second)
    lagged: Any = LaggedCount(number)  # type: ignore[arg-type]
    assert lagged.exchange() is None
    for value in (5, 3, 0):
        before, number.value = number.value, value
        assert lagged.exchange() == before


def test_a_count_on_the_cpu_is_one_exchange_late_too() -> None:
    number = torch.tensor([4])
    lagged = LaggedCount(number)
    assert lagged.exchange() is None
    number.fill_(2)
    assert lagged.exchange() == 4
    assert lagged.exchange() == 2
