"""Times the ops on a GPU and writes a dated table: `python -m bench.gpu_table FOLDER`.

Every figure is the median of replays of a CUDA graph, on random inputs that take turns until they
hold several times the L2 cache. A provider is timed only after its answer was compared with the
reference. Shares are of the device-to-device copy (bytes read and written) measured in this run.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tq_fast import ops

Inputs = tuple[Any, ...]
VOCAB = 128256
TURNS, REPLAYS = 8, 30


class Bench(NamedTuple):
    """One shape of one op: how to make inputs, what runs, and the bytes that it has to move."""

    op: str
    shape: str
    make: Callable[[], Inputs]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    reference: Callable[..., Any]
    nbytes: int


def time_in_graph(function: Callable[..., Any], inputs: Sequence[Inputs]) -> float:
    """Median microseconds of one call, inside a graph of a call for each of `inputs`."""
    side = torch.cuda.Stream()
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
    """Inputs until they hold five times the L2 cache, between TURNS and 64 of them."""
    first = make()
    nbytes = sum(x.nbytes for x in first if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, max(TURNS, math.ceil(5 * cache / max(nbytes, 1))))
    return [first, *(make() for _ in range(count - 1))]


def random_logits(rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, VOCAB, device="cuda") * 2).to(dtype)


def bench_topk(rows: int, dtype: torch.dtype) -> Bench:
    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        values, ids = torch.topk(logits, 10)
        lse = torch.logsumexp(logits.float(), -1)
        return ids, values.float() - lse.unsqueeze(-1), lse

    return Bench(
        "topk_logprobs",
        f"{rows} x {VOCAB} {dtype}, k = 10",
        lambda: (random_logits(rows, dtype),),
        lambda logits: ops.topk_logprobs(logits, 10),
        eager,
        lambda logits: ops.topk_logprobs(logits, 10, backend="ref"),
        rows * VOCAB * dtype.itemsize,
    )


def bench_sample(rows: int, dtype: torch.dtype, **cut: float) -> Bench:
    keys = torch.arange(rows, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        logprobs = logits.float().log_softmax(-1)
        masses = logprobs.exp()
        if "top_k" in cut:
            values, _ = logprobs.topk(int(cut["top_k"]))
            masses = masses.where(logprobs >= values[:, -1:], 0.0)
        if "top_p" in cut:
            ordered, order = masses.sort(dim=-1, descending=True)
            running = ordered.cumsum(-1)
            kept = running - ordered < cut["top_p"] * running[:, -1:]
            masses = torch.zeros_like(masses).scatter(-1, order, ordered * kept)
        ids = torch.multinomial(masses, 1)
        return ids, logprobs.gather(-1, ids)

    return Bench(
        "sample_tokens",
        f"{rows} x {VOCAB} {dtype}" + "".join(f", {name} = {x}" for name, x in cut.items()),
        lambda: (random_logits(rows, dtype),),
        lambda logits: ops.sample_tokens(logits, keys, step, **cut),
        eager,
        lambda logits: ops.sample_tokens(logits, keys, step, backend="ref", **cut),
        rows * VOCAB * dtype.itemsize,
    )


def bench_reweight(prompts: int) -> Bench:
    ids = torch.arange(prompts * 20, device="cuda").reshape(prompts, 20)
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def make() -> Inputs:
        prior = torch.randn(prompts, 20, device="cuda").log_softmax(-1)
        return (prior, *torch.randn(2, prompts, 20, 8, device="cuda").unbind())

    def eager(prior: Tensor, rewards: Tensor, log_weights: Tensor) -> tuple[Tensor, ...]:
        weights = log_weights.softmax(-1)
        q = (weights * rewards).sum(-1)
        spread = (weights * (rewards - q.unsqueeze(-1))).square().sum(-1)
        final = (prior + q / 0.7).log_softmax(-1)
        ess = weights.square().sum(-1).reciprocal()
        return torch.multinomial(final.exp(), 1), final, q, (spread * 8 / 7).sqrt(), ess

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda prior, rewards, weights: ops.reweight_sample(
            prior, ids, rewards, weights, alpha=0.7, step=step, backend=backend
        )

    nbytes = prompts * 20 * (8 * 4 * 2 + 4 + 8 + 4 * 4)
    shape = f"G = {prompts}, k = 20, n = 8"
    return Bench("reweight_sample", shape, make, run(None), eager, run("ref"), nbytes)


def benches() -> list[Bench]:
    found = [
        bench_topk(rows, dtype)
        for rows, dtype in itertools.product((1, 32, 160, 512), (torch.bfloat16, torch.float32))
    ]
    found += [bench_sample(rows, torch.bfloat16) for rows in (1, 64, 160, 512)]
    found += [
        bench_sample(160, torch.bfloat16, top_k=50),
        bench_sample(160, torch.bfloat16, top_p=0.9),
    ]
    return [*found, *(bench_reweight(prompts) for prompts in (1, 32))]


def gate(bench: Bench, inputs: Sequence[Inputs]) -> None:
    """Raise unless ours answers what the reference answers."""
    got, expected = bench.ours(*inputs[0]), bench.reference(*inputs[0])
    for name, a, b in zip(got._fields, got, expected, strict=True):
        if name in ("ids", "choice") and bench.op != "topk_logprobs":
            # A uniform within rounding of a boundary may fall on its other side.
            wrong = (a != b).sum().item()
            if wrong > 1 + a.numel() // 100:
                raise AssertionError(f"{bench.op} {bench.shape}: {wrong} of {a.numel()} ids differ")
        elif bench.op != "sample_tokens":
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=f"{bench.op} {name}")


def measure_copy() -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    micros = time_in_graph(lambda: target.copy_(source), [()])
    return 2 * source.nbytes / micros / 1e3


def describe_run() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "commit": commit.strip() or "unknown",
    }


def write_table(folder: Path, run: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{run['date']}-{run['machine'].replace(' ', '-')}"
    (folder / f"{stem}.json").write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in run.items()), ""]
    lines += ["| op | shape | ours us | eager us | ratio | GB/s | share of copy |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        ours, eager = row["ours_us"], row["eager_us"]
        cells = [row["op"], row["shape"], f"{ours:.1f}", f"{eager:.1f}", f"{eager / ours:.2f}"]
        cells += [f"{row['gb_per_s']:.0f}", f"{row['share']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    path = folder / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing was measured")
    torch.manual_seed(0)
    copy = measure_copy()
    one = torch.zeros(1, device="cuda")
    smallest = time_in_graph(lambda: one.add_(1), [()] * TURNS)
    run = describe_run()
    run |= {"copy GB/s": f"{copy:.0f}", "smallest kernel in a graph, us": f"{smallest:.2f}"}
    rows = []
    for bench in benches():
        inputs = turns(bench.make)
        gate(bench, inputs)
        ours, eager = (time_in_graph(function, inputs) for function in (bench.ours, bench.eager))
        speed = bench.nbytes / ours / 1e3
        rows.append(
            {"op": bench.op, "shape": bench.shape, "ours_us": ours, "eager_us": eager}
            | {"gb_per_s": speed, "share": speed / copy}
        )
        del inputs
    sys.stdout.write(write_table(folder, run, rows).read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
