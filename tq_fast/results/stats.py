"""Counts and times of a decode."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator

from .. import device_times


@dataclasses.dataclass
class DecodeStats:
    """Counts of one decode.

    Attributes:
        token_forwards: tokens that went through each model, by role ("baseline", "sft",
            "reward", "baseline_reward"; "reward_states" for the reward model's pass beside the
            prior, where a value head reads it); a reward that is a plain callable counts none.
        num_steps: tokens chosen, over all prompts.
        rollout_steps: forward passes of the baseline for roll-outs, each for all rows.
        rollouts_run: roll-outs that were run.
        rollouts_skipped: roll-outs that were not needed (candidates that end the response, or that
            could not be chosen any more).
        peak_kv_bytes: most bytes of KV held at a time, by role.
        seconds: time by phase ("prefill", "candidates", "rollout", "reward", "reweight",
            "commit"), in seconds. With every model on the CPU, wall time. With models on GPUs, time
            of the GPU: from the moment when it reaches the beginning of the phase in its stream to
            that when it reaches the end, its waiting for the host included; where models are on
            several, of the one that takes longest. Phases of one GPU follow each other, so that
            their sum is the time of the decode. A phase that an exception ends is not counted then.
    """

    token_forwards: dict[str, int] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    rollout_steps: int = 0
    rollouts_run: int = 0
    rollouts_skipped: int = 0
    peak_kv_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # Phases that the GPUs may not have ended yet, in their order. It is no field: it is empty
        # in the result of a decode.
        self._intervals: deque[device_times.Interval] = deque()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`: of GPUs, where a decode times some."""
        begin = device_times.mark()
        if begin:
            yield
            self._intervals.append(device_times.Interval(name, begin, device_times.mark()))
            while self._intervals and self._intervals[0].is_over():
                self._add_first_interval()
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def settle(self) -> None:
        """Wait for the phases that GPUs have not ended yet, and add their times."""
        while self._intervals:
            self._intervals[0].wait()
            self._add_first_interval()

    def _add_first_interval(self) -> None:
        interval = self._intervals.popleft()
        self.seconds[interval.name] = self.seconds.get(interval.name, 0.0) + interval.seconds()

    def add(self, other: DecodeStats) -> None:
        """Add the counts of another forest; of two peaks keep the larger one."""
        for name in ("num_steps", "rollout_steps", "rollouts_run", "rollouts_skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for role, count in other.token_forwards.items():
            self.token_forwards[role] = self.token_forwards.get(role, 0) + count
        self._intervals += other._intervals
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for role, num_bytes in other.peak_kv_bytes.items():
            self.peak_kv_bytes[role] = max(self.peak_kv_bytes.get(role, 0), num_bytes)
