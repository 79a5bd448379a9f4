"""Times whole decodes on a GPU and writes a dated table: `python -m bench.gpu_decode FOLDER`.

The set-up is that of bench/test_decode.py (random-weight Llama shapes of 134 M parameters, k = 10,
one greedy roll-out of 20 tokens a candidate). Roll-outs run as CUDA graphs and without, beside
`generate` over copies of the prompt's KV. The clock stops at every token, whose id the host reads.
Models of 7B, beside the roofline and phase by phase, are those of bench/gpu_trio.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tq_fast
from bench.decode_models import DTYPES, Duo, prompt_of, random_duo
from bench.expanded import decode_expanded
from bench.gpu_table import describe_run, file_stem
from bench.runs import fill_table
from tq_fast.config import SpeedOptions

K, HORIZON = 10, 20
SETTINGS = {"k": K, "horizon": HORIZON, "strategy": "greedy", "rollout": "greedy"}
NUM_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A number of prompts of one length, in one dtype."""

    dtype: str
    length: int
    num_prompts: int

    @property
    def prompts(self) -> list[torch.Tensor]:
        return [prompt_of(self.length + i)[: self.length] for i in range(self.num_prompts)]


CASES = [
    Case(dtype, length, num_prompts)
    for dtype in DTYPES
    for length, num_prompts in ((128, 1), (512, 1), (2048, 1), (512, 8))
]


def time_decode(duo: Duo, case: Case, speed: SpeedOptions) -> tuple[float, tq_fast.DecodeResult]:
    """Return the median milliseconds between two steps, the first left out, and the result."""
    decoder = tq_fast.TransferDecoder(duo.baseline, duo.reward, speed=speed)
    marks: list[float] = []
    result = decoder.decode(
        case.prompts,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=(),
        batch_size=case.num_prompts,
        on_token=lambda idx: marks.append(time.perf_counter()) if idx == 0 else None,
        **SETTINGS,
    )
    between = [after - before for before, after in itertools.pairwise(marks)]
    # The second token is left out too: graphs captured before the first may be captured again.
    return 1e3 * statistics.median(between[1:]), result


def measure(duo: Duo, case: Case) -> dict[str, Any]:
    """Return one row: milliseconds a step with graphs and without, and of `generate`."""
    duo = duo.to(DTYPES[case.dtype])
    plain = SpeedOptions(graph_rollouts=False)
    for speed in (SpeedOptions(), plain):
        time_decode(duo, case, speed)
    graphs, ours = time_decode(duo, case, SpeedOptions())
    launches, other = time_decode(duo, case, plain)
    if case.dtype == "fp32":
        same = zip(ours.sequences, other.sequences, strict=True)
        if not all(torch.equal(a, b) for a, b in same):
            raise AssertionError(f"{case}: the graphs choose other tokens")
    row = dataclasses.asdict(case) | {"graphs_ms": graphs, "launches_ms": launches}
    row["generate_ms"] = None
    if case.num_prompts == 1:
        prompt = case.prompts[0].to(duo.baseline.device)
        sizes = {"k": K, "horizon": HORIZON}
        _, seconds, _ = decode_expanded(duo, prompt, num_tokens=4, **sizes)
        row["generate_ms"] = 1e3 * statistics.median(seconds[1:])
    return row


def write_table(folder: Path, run: dict[str, str], rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem("gpu-decode", run)
    (folder / f"{stem}.json").write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n")
    names = ["dtype", "prompt", "prompts", "ms a step, graphs", "launched one by one", "ratio"]
    names += ["tokens/s", "generate, copied KV", "ratio"]
    lines = [", ".join(f"{name} {value}" for name, value in run.items()), ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        graphs, launches, peer = row["graphs_ms"], row["launches_ms"], row["generate_ms"]
        cells = [row["dtype"], str(row["length"]), str(row["num_prompts"]), f"{graphs:.1f}"]
        cells += [f"{launches:.1f}", f"{launches / graphs:.2f}"]
        cells.append(f"{1e3 * row['num_prompts'] / graphs:.1f}")
        cells += ["", ""] if peer is None else [f"{peer:.1f}", f"{peer / graphs:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    path = folder / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing was measured")
    duo = random_duo()
    duo.baseline.cuda()
    duo.reward.cuda()
    run = describe_run()
    fill_table(CASES, functools.partial(measure, duo), functools.partial(write_table, folder, run))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
