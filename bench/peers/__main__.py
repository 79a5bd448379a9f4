"""Times tq_fast beside vLLM on a CPU: `python -m bench.peers --output FILE`.

Each side is a worker process, vLLM's in an environment of its own (`make peers` makes it). They
take turns in one run; the one that does not work is stopped. Nothing is reported of a case on which
the two do not compute the same.

A step of Transfer Q* takes the models of bench/decode_models.py: k = 10 candidates, a greedy
roll-out of 20 tokens each, the arg max of the steered law. For vLLM it is three calls of its
offline engine, with prefix caching: the candidates, the roll-outs in one batch, the rewards. What
lies behind the last full block of vLLM's cache is encoded again for every row; prompts of 512 and
3,072 tokens end with a block, so that their first tokens, which are timed here, are its best ones.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.conftest import processor
from bench.decode_models import DTYPES
from bench.peers.cases import KINDS, PROMPT_LENGTHS, Case, all_cases
from bench.peers.measure import Row, measure
from bench.peers.models import save_models
from bench.peers.table import table
from bench.peers.workers import ROOT, Worker, WorkerFailed
from bench.runs import commit_id, fill_table

THREADS = 2
KV_GIGABYTES = 4


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="keep the table in this file, too")
    parser.add_argument(
        "--vllm",
        type=Path,
        default=Path(os.environ.get("PEERS_VLLM", ROOT / "build/vllm/bin/python")),
        help="vLLM's own Python; default: PEERS_VLLM, or that of `make peers`",
    )
    parser.add_argument("--models", type=Path, help="keep the saved models in this folder")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--prompt", nargs="+", type=int, choices=PROMPT_LENGTHS, default=list(PROMPT_LENGTHS)
    )
    parser.add_argument("--number", nargs="+", type=int, help="prompts, or responses, at once")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--steps", type=int, default=2, help="of a turn of Transfer Q*")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile its models")
    parser.add_argument("--block-size", type=int, default=32, help="of vLLM's KV")
    return parser.parse_args(arguments)


def chosen(cases: Sequence[Case], args: argparse.Namespace) -> list[Case]:
    """Return the cases that the options leave.

    Drawing has one length of prompts, and one prompt is encoded at a time: these kinds stay
    whatever `--prompt` and `--number` say.
    """
    return [
        case
        for case in cases
        if case.kind in args.kind
        and case.dtype in args.dtype
        and (case.kind == "sample" or case.prompt_len in args.prompt)
        and (case.kind == "encode" or args.number is None or case.number in args.number)
    ]


@contextlib.contextmanager
def running(args: argparse.Namespace, folder: Path, dtype: str) -> Iterator[dict[str, Worker]]:
    """Start both workers with the models of `folder` in `dtype`."""
    common = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    ours = [sys.executable, "-m", "bench.peers.tq_fast_worker", str(folder), dtype]
    theirs = [str(args.vllm), "-m", "bench.peers.vllm_worker", str(folder), dtype]
    theirs += ["--block-size", str(args.block_size), *([] if args.compile else ["--eager"])]
    own = {
        # The engine runs in the worker, without a process and messages between.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIGABYTES),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (
        Worker("tq_fast", ours, common) as mine,
        Worker("vLLM", theirs, {**common, **own}) as peer,
    ):
        yield {"tq_fast": mine, "vLLM": peer}


def describe(workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, str]:
    """Return what stands above the table."""
    sides = {side: worker.call("describe") for side, worker in workers.items()}
    for side, said in sides.items():
        if said["num_threads"] != THREADS:
            raise SystemExit(f"{side} has {said['num_threads']} threads, {THREADS} were asked for")
    mode = "compiled" if args.compile else "eager"
    return {
        "command": f"python -m bench.peers {shlex.join(sys.argv[1:])}",
        "machine": f"{processor()}, {os.cpu_count()} cores, {THREADS} threads a side, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        "tq_fast": f"commit {commit_id(short=True) or 'unknown'}, {sides['tq_fast']['versions']}",
        "vLLM": f"{sides['vLLM']['versions']}; {mode}, block size {args.block_size}, prefix "
        f"caching, {KV_GIGABYTES} GB of KV a model",
        "load average before": f"{os.getloadavg()[0]:.1f}",
        "": f"134 M Llama shapes; medians of {args.turns} turns a side, {args.steps} steps a turn "
        "of Transfer Q* (k 10, n 1, L 20, greedy)",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    # A run that is ended ends its workers, too, which would stay stopped for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cases = chosen(all_cases(), args)
    if not cases:
        raise SystemExit("no case is left by these options")
    if not args.vllm.exists():
        raise SystemExit(f"no Python of vLLM at {args.vllm}: make peers, or set PEERS_VLLM")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.models or Path(temporary)
        if not (folder / "tokenizer").exists():
            save_models(folder)
        output = args.output or Path(temporary) / "table"
        Comparison(args, folder, output).run(cases)


class Comparison:
    """One run: the workers of one dtype at a time, and the rows so far."""

    def __init__(self, args: argparse.Namespace, folder: Path, output: Path) -> None:
        self.args, self.folder, self.output = args, folder, output
        self.stack = contextlib.ExitStack()
        self.workers: dict[str, Worker] = {}
        self.dtype: str | None = None
        self.header: dict[str, str] = {}

    def run(self, cases: Sequence[Case]) -> None:
        """Measure the cases, and print the table; those of a dtype lie together."""
        with self.stack:
            fill_table(cases, self.measure, self.write)

    def measure(self, case: Case) -> Row:
        """Measure one case, by new workers where the last ones failed or have another dtype."""
        if case.dtype != self.dtype:
            self.end_workers()
            self.workers = self.stack.enter_context(running(self.args, self.folder, case.dtype))
            self.header = self.header or describe(self.workers, self.args)
            self.dtype = case.dtype
        sys.stderr.write(f"{case}\n")
        try:
            return measure(self.workers, case, turns=self.args.turns, steps=self.args.steps)
        except WorkerFailed:
            # The side that did not fail may be in the midst of a decode, and would take the next
            # case's commands for those of this one.
            self.end_workers()
            raise

    def end_workers(self) -> None:
        self.dtype = None
        self.stack.close()

    def write(self, rows: list[Row]) -> Path:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(table(self.header, rows))
        return self.output


if __name__ == "__main__":
    main()
