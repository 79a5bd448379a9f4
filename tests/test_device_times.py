"""The times of phases on GPUs, by stand-ins for events and streams whose clocks the tests turn."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import tq_fast
from tests import zoo
from tq_fast import DecodeStats, device_times, session
from tq_fast.device_times import timing_on

GPUS = (torch.device("cuda:0"), torch.device("cuda:1"))


class Machine:
    """A host and two GPUs: `now` is the time of the host, `busy_until` that of each stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.busy_until = dict.fromkeys(GPUS, 0.0)
        self.waits = 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self, enable_timing))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)

    def launch(self, gpu: torch.device, seconds: float) -> None:
        """Hand over work, which begins when the stream is free."""
        self.busy_until[gpu] = max(self.busy_until[gpu], self.now) + seconds


class Event:
    """`torch.cuda.Event`: it takes the time at which its stream gets to it."""

    def __init__(self, machine: Machine, enable_timing: bool) -> None:
        assert enable_timing
        self.machine = machine

    def record(self, stream: torch.device) -> None:
        self.time = max(self.machine.busy_until[stream], self.machine.now)
        self.stream = stream

    def query(self) -> bool:
        return self.time <= self.machine.now

    def synchronize(self) -> None:
        if not self.query():
            self.machine.waits += 1
            self.machine.now = self.time

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "CUDA raises where an event is not over"
        assert self.stream == end.stream
        return (end.time - self.time) * 1e3


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_phase_takes_as_long_as_the_gpu_is_at_it_and_the_host_never_waits(machine) -> None:
    stats = DecodeStats()
    with timing_on(GPUS[:1]):
        for _ in range(2):
            with stats.phase("rollout"):
                machine.launch(GPUS[0], 5.0)
                machine.now += 1.0
            with stats.phase("reward"):
                machine.launch(GPUS[0], 2.0)
                machine.now += 0.5
    assert (machine.now, machine.waits) == (3.0, 0)
    stats.settle()
    assert stats.seconds == pytest.approx({"rollout": 10.0, "reward": 4.0})
    assert machine.now == 14.0


def test_a_host_that_is_late_counts_as_time_of_its_phase(machine) -> None:
    stats = DecodeStats()
    with timing_on(GPUS[:1]), stats.phase("candidates"):
        machine.launch(GPUS[0], 1.0)
        machine.now += 4.0
    # The GPU was through before the host came to the end: nothing is left to wait for.
    assert stats.seconds == pytest.approx({"candidates": 4.0})
    stats.settle()
    assert machine.waits == 0


def test_of_several_gpus_the_one_that_takes_longest_counts(machine) -> None:
    stats = DecodeStats()
    with timing_on(GPUS):
        with stats.phase("rollout"):
            machine.launch(GPUS[0], 3.0)
        with stats.phase("reward"):
            machine.launch(GPUS[1], 7.0)
            machine.launch(GPUS[0], 0.5)
    stats.settle()
    assert stats.seconds == pytest.approx({"rollout": 3.0, "reward": 7.0})


def test_phases_that_are_not_over_are_handed_on_with_the_counts(machine) -> None:
    whole, part = DecodeStats(), DecodeStats()
    with timing_on(GPUS[:1]), part.phase("commit"):
        machine.launch(GPUS[0], 2.0)
    whole.add(part)
    whole.settle()
    assert whole.seconds == pytest.approx({"commit": 2.0})


def test_a_phase_that_fails_on_a_gpu_is_left_out(machine) -> None:
    stats = DecodeStats()
    with timing_on(GPUS[:1]), pytest.raises(torch.OutOfMemoryError), stats.phase("rollout"):
        raise torch.OutOfMemoryError("no memory")
    stats.settle()
    assert stats.seconds == {}


def test_without_a_gpu_the_clock_of_the_host_counts_and_no_event_is_made(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", None)
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("tq_fast.results.stats.time.perf_counter", lambda: next(clock))
    stats = DecodeStats()
    with stats.phase("rollout"):
        pass
    with pytest.raises(ValueError, match="broken"), stats.phase("rollout"):
        raise ValueError("broken")
    assert stats.seconds == {"rollout": 3.5}


def test_the_gpus_of_all_weights_and_passes_are_timed_each_once() -> None:
    def module(*devices: str, runs_on: str | None = None) -> SimpleNamespace:
        weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
        part = SimpleNamespace()
        if runs_on is not None:
            part._hf_hook = SimpleNamespace(execution_device=torch.device(runs_on))
        return SimpleNamespace(parameters=lambda: weights, modules=lambda: [part])

    assert session.gpus_of([module("cpu"), module("meta", runs_on="cpu")]) == []
    spread = module("cuda:1", "cuda:0", "cuda:1")
    assert session.gpus_of([spread, module("cpu"), module("cuda:0")]) == list(GPUS)


def test_a_decode_times_all_its_phases_and_waits_for_none_before_the_last_token(
    machine, monkeypatch
) -> None:
    """Every token is handed over before the GPU has done the first."""
    monkeypatch.setattr(session, "gpus_of", lambda modules: list(GPUS[:1]))
    real = device_times.mark

    def mark_and_launch() -> tuple[Event, ...]:
        events = real()
        machine.launch(GPUS[0], 1.0)
        return events

    monkeypatch.setattr(device_times, "mark", mark_and_launch)
    waits_at_tokens: list[int] = []
    decoder = tq_fast.TransferDecoder(zoo.language_model("llama"), zoo.classifier("llama"))
    result = decoder.decode(
        [torch.tensor([3, 1, 4])],
        k=2,
        horizon=2,
        max_new_tokens=3,
        eos_token_id=(),
        on_token=lambda idx: waits_at_tokens.append(machine.waits),
    )
    phases = {"prefill": 1, "candidates": 3, "rollout": 3, "reward": 3, "reweight": 3, "commit": 3}
    assert result.stats.seconds == pytest.approx(phases)
    assert waits_at_tokens == [0, 0, 0] and machine.waits == sum(phases.values())
    assert dataclasses.asdict(result.stats).keys() == DecodeStats().__dataclass_fields__.keys()
