"""Times a trio of 7B-shaped models on a GPU: `python -m bench.gpu_trio FOLDER`.

Baseline, SFT model and reward classifier have the shapes of Llama-2-7B, in bf16, with random
weights of their own that are made on the device. One prompt is decoded (k = 10, one greedy roll-out
of 20 tokens a candidate), with roll-outs as CUDA graphs and without. A row holds

- the median milliseconds between two tokens, whose ids the host reads, and the share of them that
  the least bytes (`least_bytes`) take at the copy bandwidth measured in this run;
- milliseconds a phase, where the host waits for the device at every border; and by the decode's own
  events, over the whole decode with its prefill and the capture of its graphs;
- the share of time in which the device was idle, by the profiler.

A trace of two tokens with graphs is written beside the table, for chrome://tracing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)

import tq_fast
from bench.decode_models import prompt_of
from bench.gpu_table import describe_run, file_stem, measure_copy
from bench.runs import fill_table
from tq_fast.config import SpeedOptions

K, HORIZON = 10, 20
DTYPE = torch.bfloat16
# Graphs are captured before the first token, and may be captured again before the second.
WARM_TOKENS, TIMED_TOKENS, PROFILED_TOKENS = 2, 4, 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model; weights and KV have two bytes an element."""

    num_layers: int = 32
    hidden: int = 4096
    intermediate: int = 11_008
    num_heads: int = 32
    vocab_size: int = 32_000

    @property
    def body_bytes(self) -> int:
        """Bytes of the weights that every pass multiplies by, without the output layer."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        return DTYPE.itemsize * self.num_layers * layer

    @property
    def head_bytes(self) -> int:
        """Bytes of the LM head."""
        return DTYPE.itemsize * self.vocab_size * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return DTYPE.itemsize * 2 * self.num_layers * self.hidden

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=8_192,
            tie_word_embeddings=False,
            num_labels=1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


@dataclasses.dataclass(frozen=True)
class Trio:
    baseline: PreTrainedModel
    sft: PreTrainedModel
    reward: PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt length, and whether roll-outs run as CUDA graphs."""

    prompt: int
    graphs: bool


CASES = [Case(prompt, graphs) for prompt in (512, 4096) for graphs in (True, False)]


def least_passes(horizon: int) -> int:
    """Passes over a model's weights that a token takes: a roll-out a depth, SFT and reward once."""
    return horizon + 2


def least_bytes(shape: Shape, *, prompt: int, rows: int, horizon: int) -> int:
    """Return the bytes of weights and KV that one token reads, everything once a pass.

    The baseline runs `horizon` passes of `rows` new tokens over the prompt and the branches so far;
    the SFT model one pass of one token; the reward one pass over the `horizon` tokens of each row.
    """
    body, kv = shape.body_bytes, shape.kv_bytes
    baseline = horizon * (body + shape.head_bytes + prompt * kv)
    baseline += kv * rows * sum(range(1, horizon + 1))
    sft = body + shape.head_bytes + prompt * kv
    reward = body + kv * (prompt + rows * horizon)
    return baseline + sft + reward


def random_trio(shape: Shape, device: str) -> Trio:
    """Make three models of `shape` on `device`, with weights of their own."""
    torch.manual_seed(7)
    makers = (
        AutoModelForCausalLM,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )
    with torch.device(device):
        models = [maker.from_config(shape.config(), dtype=DTYPE).eval() for maker in makers]
    return Trio(*models)


def decode(
    trio: Trio, case: Case, num_tokens: int, on_token: Callable[[int], None] | None = None
) -> tq_fast.DecodeResult:
    speed = SpeedOptions() if case.graphs else SpeedOptions(graph_rollouts=False)
    decoder = tq_fast.TransferDecoder(trio.baseline, trio.reward, sft=trio.sft, speed=speed)
    return decoder.decode(
        [prompt_of(case.prompt)],
        k=K,
        horizon=HORIZON,
        strategy="greedy",
        rollout="greedy",
        max_new_tokens=num_tokens,
        eos_token_id=(),
        on_token=on_token,
    )


def time_tokens(trio: Trio, case: Case) -> tuple[float, dict[str, float]]:
    """Return the median milliseconds a token, and those of each phase as the decode counts them."""
    marks: list[float] = []
    num_tokens = WARM_TOKENS + TIMED_TOKENS
    result = decode(trio, case, num_tokens, lambda idx: marks.append(time.perf_counter()))
    between = [after - before for before, after in itertools.pairwise(marks)]
    phases = {name: 1e3 * s / num_tokens for name, s in result.stats.seconds.items()}
    return 1e3 * statistics.median(between[WARM_TOKENS - 1 :]), phases


def time_phases(trio: Trio, case: Case) -> dict[str, float]:
    """Return milliseconds a token of each phase, the host waiting for the device at every border.

    Warm tokens are left out, and so is the prefill, which comes before the first.
    """
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(stats: tq_fast.DecodeStats, name: str) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    seen = itertools.count(1)

    def forget_warm_tokens(idx: int) -> None:
        if next(seen) == WARM_TOKENS:
            seconds.clear()

    with mock.patch.object(tq_fast.DecodeStats, "phase", phase):
        decode(trio, case, WARM_TOKENS + TIMED_TOKENS, forget_warm_tokens)
    return {name: 1e3 * taken / TIMED_TOKENS for name, taken in seconds.items()}


def profile_tokens(trio: Trio, case: Case, activities: Iterable[ProfilerActivity]) -> Any:
    """Return the profile of the tokens after the warm ones."""
    profiler = torch.profiler.profile(activities=list(activities))
    seen = itertools.count(1)

    def switch(idx: int) -> None:
        token = next(seen)
        if token == WARM_TOKENS:
            synchronize()
            profiler.start()
        elif token == WARM_TOKENS + PROFILED_TOKENS:
            synchronize()
            profiler.stop()

    decode(trio, case, WARM_TOKENS + PROFILED_TOKENS, switch)
    return profiler


def idle_share(spans: Iterable[tuple[float, float]]) -> float | None:
    """Return the share of the time from the first begin to the last end that no span covers.

    Spans are (begin, end) of kernels and copies, which may overlap; None without any.
    """
    ordered = sorted(spans)
    if not ordered:
        return None
    first, reached = ordered[0][0], ordered[0][0]
    busy = 0.0
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1.0 - busy / (reached - first) if reached > first else None


def spans_on_device(profiler: Any) -> list[tuple[float, float]]:
    return [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def measure(trio: Trio, shape: Shape, copy: float, folder: Path, case: Case) -> dict[str, Any]:
    """Return one row, and write the trace of a row with graphs; `copy` is in GB/s."""
    millis, by_events = time_tokens(trio, case)
    nbytes = least_bytes(shape, prompt=case.prompt, rows=K, horizon=HORIZON)
    floor = nbytes / copy / 1e6
    row = dataclasses.asdict(case) | {"ms": millis, "least_gb": nbytes / 1e9, "floor_ms": floor}
    row |= {"share": floor / millis, "phases_ms": time_phases(trio, case)}
    row["phases_by_events_ms"] = by_events
    # A profile of the device alone slows the host least.
    supported = torch.profiler.supported_activities()
    on_device = supported & {ProfilerActivity.CUDA} or supported
    row["idle_share"] = idle_share(spans_on_device(profile_tokens(trio, case, on_device)))
    if case.graphs:
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"gpu-trio-trace-{case.prompt}.json.gz"
        profile_tokens(trio, case, supported).export_chrome_trace(str(trace))
        row["trace"] = trace.name
    return row


PHASES = ("candidates", "rollout", "reward", "reweight", "commit")


def write_table(folder: Path, run: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem("gpu-trio", run)
    (folder / f"{stem}.json").write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n")
    names = ["prompt", "roll-outs", "ms a token", "least GB", "floor ms", "share of roofline"]
    names += ["device idle", *(f"{phase} ms" for phase in PHASES)]
    lines = [", ".join(f"{name} {value}" for name, value in run.items()), ""]
    lines += ["Phases: the host waits for the device at every border.", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [str(row["prompt"]), "graphs" if row["graphs"] else "launched one by one"]
        cells += [f"{row['ms']:.1f}", f"{row['least_gb']:.1f}", f"{row['floor_ms']:.1f}"]
        cells.append(f"{row['share']:.0%}")
        cells.append("" if row["idle_share"] is None else f"{row['idle_share']:.0%}")
        cells += [f"{row['phases_ms'][phase]:.1f}" for phase in PHASES]
        lines.append(f"| {' | '.join(cells)} |")
    path = folder / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def require_memory(shape: Shape) -> None:
    """Refuse a device that does not hold three sets of weights and the KV of the longest prompt."""
    longest = max(case.prompt for case in CASES) + K * (HORIZON + 1)
    needed = 3 * (shape.body_bytes + 2 * shape.head_bytes + longest * shape.kv_bytes)
    free, _ = torch.cuda.mem_get_info()
    # The rest is activations, graphs and what the allocator rounds up.
    if 1.2 * needed > free:
        raise SystemExit(
            f"the trio needs {1.2 * needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB "
            "are free: nothing was measured"
        )


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing was measured")
    shape = Shape()
    require_memory(shape)
    copy = measure_copy()
    torch.cuda.empty_cache()
    trio = random_trio(shape, "cuda")
    run = describe_run() | {
        "copy GB/s": f"{copy:.0f}",
        "models": "three of Llama-2-7B shapes in bf16, random weights of their own",
        "passes a token": str(least_passes(HORIZON)),
    }
    measure_one = functools.partial(measure, trio, shape, copy, folder)
    fill_table(CASES, measure_one, functools.partial(write_table, folder, run))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
