"""Times the ops on a GPU and writes a dated table: `python -m bench.gpu_table FOLDER`.

Every figure is the median of replays of a CUDA graph, on random inputs that take turns until they
hold several times the L2 cache. A provider is timed only after its answer was compared with the
reference. Shares are of the device-to-device copy (bytes read and written) measured in this run.

The table is written again after every row, and a row that fails is named while the rest goes on.
torch.compile takes long to compile: once COMPILE_SECONDS have passed, its column stays empty.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import Bench, Inputs, benches
from bench.runs import commit_id, fill_table

TURNS, REPLAYS = 8, 30
COMPILE_SECONDS = 120.0


def time_in_graph(function: Callable[..., Any], inputs: Sequence[Inputs]) -> float:
    """Return the median microseconds of one call, in a graph of a call for each of `inputs`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in inputs:
            function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            function(*arguments)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def turns(make: Callable[[], Inputs]) -> list[Inputs]:
    """Return inputs for TURNS to 64 calls, which differ until they hold five times the L2 cache."""
    first = make()
    nbytes = sum(x.nbytes for x in first if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, math.ceil(5 * cache / max(nbytes, 1)))
    made = [first, *(make() for _ in range(count - 1))]
    return [made[i % len(made)] for i in range(max(TURNS, len(made)))]


def gate(bench: Bench, inputs: Inputs) -> None:
    """Raise unless ours returns what the reference returns; each gets inputs of its own."""
    answers = []
    for function in (bench.ours, bench.reference):
        own = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        answers.append(function(*own))
    try:
        bench.gate(*answers)
    except AssertionError as difference:
        raise AssertionError(f"{bench.op} {bench.shape}: {difference}") from difference


def measure_copy() -> float:
    """Return the GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    micros = time_in_graph(lambda: target.copy_(source), [()])
    return 2 * source.nbytes / micros / 1e3


def describe_run() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "commit": commit_id() or "unknown",
    }


def file_stem(kind: str, run: dict[str, str]) -> str:
    """Return the name of a table of this run, without its ending."""
    return f"{kind}-{run['date']}-{run['machine'].replace(' ', '-')}"


def write_table(folder: Path, run: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem("gpu", run)
    (folder / f"{stem}.json").write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in run.items()), ""]
    names = ["op", "shape", "ours us", "eager us", "ratio", "torch.compile us", "ratio"]
    names += ["GB/s", "of copy", "TFLOP/s", "of bare product", "smallest kernels"]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        ours, eager = row["ours_us"], row["eager_us"]
        cells = [row["op"], row["shape"], f"{ours:.1f}", f"{eager:.1f}", f"{eager / ours:.2f}"]
        compiled, product = row["compiled_us"], row["share_of_product"]
        none = compiled is None
        cells += ["", ""] if none else [f"{compiled:.1f}", f"{compiled / ours:.2f}"]
        cells += [f"{row['gb_per_s']:.0f}", f"{row['share']:.0%}"]
        cells.append(f"{row['tflop_per_s']:.1f}" if row["tflop_per_s"] else "")
        cells.append("" if product is None else f"{product:.0%}")
        cells.append(f"{row['smallest_kernels']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    path = folder / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def time_compiled(bench: Bench, inputs: Sequence[Inputs]) -> float | None:
    """Return the microseconds of the compiled eager code; None where torch.compile fails."""
    try:
        return time_in_graph(torch.compile(bench.eager, dynamic=False), inputs)
    except Exception as error:
        sys.stderr.write(f"torch.compile of {bench.op}, {bench.shape}: {str(error)[:300]}\n")
        return None


def measure(bench: Bench, copy: float, smallest: float, *, compiles: bool) -> dict[str, Any]:
    """Return one row of the table: microseconds, GB/s, and shares of what this device can do.

    `copy` is in GB/s; `smallest` is the microseconds of the smallest kernel in a graph.
    """
    gate(bench, bench.make())
    inputs = turns(bench.make)
    ours, eager = (time_in_graph(function, inputs) for function in (bench.ours, bench.eager))
    speed = bench.nbytes / ours / 1e3
    row = {"op": bench.op, "shape": bench.shape, "ours_us": ours, "eager_us": eager}
    row |= {"gb_per_s": speed, "share": speed / copy, "share_of_product": None}
    row |= {"tflop_per_s": bench.flops / ours / 1e6, "smallest_kernels": ours / smallest}
    if bench.product is not None:
        row["share_of_product"] = time_in_graph(bench.product, inputs) / ours
    row["compiled_us"] = time_compiled(bench, inputs) if compiles else None
    return row


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing was measured")
    torch.manual_seed(0)
    start = time.monotonic()
    copy = measure_copy()
    one = torch.zeros(1, device="cuda")
    smallest = time_in_graph(lambda: one.add_(1), [()] * TURNS)
    run = describe_run()
    run |= {"copy GB/s": f"{copy:.0f}", "smallest kernel in a graph, us": f"{smallest:.2f}"}

    def measure_one(bench: Bench) -> dict[str, Any]:
        compiles = time.monotonic() - start < COMPILE_SECONDS
        return measure(bench, copy, smallest, compiles=compiles)

    fill_table(
        benches(),
        measure_one,
        functools.partial(write_table, folder, run),
        lambda bench: f"{bench.op}, {bench.shape}",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
