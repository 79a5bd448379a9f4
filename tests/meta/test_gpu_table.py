"""The code of bench/gpu_table.py on small CPU tensors: only the clock needs a GPU."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from bench import gpu_cases, gpu_decode, gpu_table, runs
from bench.decode_models import Duo
from tests import zoo
from tests.on_the_cpu import OnTheCpu
from tq_fast import ops

# At these sizes each bench takes milliseconds.
SMALL = {
    "bench_topk": (3, torch.bfloat16),
    "bench_sample": (40, torch.bfloat16),
    "bench_value_sample": (40, 16, torch.bfloat16),
    "bench_reweight": (4,),
    "bench_advance": (40,),
    "bench_log_ratio": (3, 4, 500),
    "bench_linear_logprob": (3, 4, 32),
    "bench_attention": (6, 4, 2, 16, 70),
    "bench_prompt": (33, 4, 2, 16),
}


@pytest.fixture
def small_benches(monkeypatch):
    monkeypatch.setattr(gpu_cases, "VOCAB", 2000)
    monkeypatch.setattr(gpu_table, "turns", lambda make: [make() for _ in range(2)])

    def run_each(function, inputs):
        for arguments in inputs:
            function(*arguments)
        return 7.0

    monkeypatch.setattr(gpu_table, "time_in_graph", run_each)
    with OnTheCpu():
        yield [getattr(gpu_cases, name)(*sizes) for name, sizes in SMALL.items()]


def test_every_bench_passes_its_gate_and_fills_its_row(small_benches, tmp_path):
    measure = functools.partial(gpu_table.measure, copy=100.0, smallest=2.0, compiles=False)
    rows = [measure(bench) for bench in small_benches]
    run = {"date": "2026-01-01", "machine": "no GPU"}
    table = gpu_table.write_table(tmp_path, run, rows).read_text()
    for bench in small_benches:
        assert f"| {bench.op} | {bench.shape} | 7.0 | 7.0 | 1.00 | | |" in " ".join(table.split())
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    (stored,) = tmp_path.glob("*.json")
    assert json.loads(stored.read_text())["rows"][0]["ours_us"] == 7.0


def test_no_eager_provider_waits_for_the_device(small_benches, monkeypatch):
    """A graph is captured around each provider, and `multinomial` or `item` would end the run."""
    for name in ("multinomial", "Tensor.multinomial", "Tensor.item", "Tensor.tolist"):
        holder = torch.Tensor if "." in name else torch
        monkeypatch.setattr(holder, name.split(".")[-1], None)
    for bench in small_benches:
        bench.eager(*bench.make())


def test_torch_compile_stands_beside_or_its_failure_is_said(small_benches, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    bench = small_benches[0]
    assert gpu_table.time_compiled(bench, [bench.make()]) == 7.0

    def broken(*inputs):
        raise RuntimeError("no such lowering")

    assert gpu_table.time_compiled(bench._replace(eager=broken), [bench.make()]) is None
    assert "no such lowering" in capsys.readouterr().err


def test_the_gate_of_every_bench_can_fail(small_benches):
    for bench in small_benches:
        inputs = bench.make()

        def spoiled(*given, bench=bench):
            answer = bench.ours(*given)
            return (
                type(answer)(*(x + 1 for x in answer))
                if hasattr(answer, "_fields")
                else [x + 1 for x in answer]
            )

        with pytest.raises(AssertionError):
            gpu_table.gate(bench._replace(ours=spoiled), inputs)


def test_every_op_that_has_a_gpu_kernel_is_in_the_table():
    listed = {bench for bench in SMALL}
    assert listed == {name for name in vars(gpu_cases) if name.startswith("bench_")}
    described = ops.describe_backends()
    with_kernel = {
        name
        for name, reasons in described.items()
        if any(reasons[gpu] != f"{name} has no {gpu} kernel" for gpu in ("cuda", "triton"))
    }
    with OnTheCpu():
        made = {getattr(gpu_cases, name)(*sizes).op for name, sizes in SMALL.items()}
    assert made == with_kernel


def test_whole_decodes_fill_their_table(monkeypatch, tmp_path):
    small = {"vocab_size": 50, "max_position_embeddings": 128}
    monkeypatch.setattr(gpu_decode, "prompt_of", lambda length: torch.arange(length) % 50)
    duo = Duo(zoo.language_model("llama", **small), zoo.classifier("llama", **small))
    cases = [gpu_decode.Case("fp32", 9, 1), gpu_decode.Case("bf16", 9, 2)]
    rows = [gpu_decode.measure(duo, case) for case in cases]
    assert all(row["graphs_ms"] > 0 and row["launches_ms"] > 0 for row in rows)
    assert rows[0]["generate_ms"] > 0 and rows[1]["generate_ms"] is None
    run = {"date": "2026-01-01", "machine": "no GPU"}
    table = gpu_decode.write_table(tmp_path, run, rows).read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| fp32 | 9 | 1 | ")


@pytest.mark.parametrize("module", [gpu_table, gpu_decode], ids=["ops", "decodes"])
def test_a_row_that_fails_is_said_and_the_others_are_measured(
    module, small_benches, monkeypatch, tmp_path, capsys
):
    measured = []

    def measure(*given, **options):
        case = given[0] if module is gpu_table else given[1]
        measured.append(case)
        if len(measured) == 2:
            raise RuntimeError("this kernel does not run")
        return {"case": str(len(measured))}

    def write(folder, run, rows):
        (folder / "table.md").write_text(repr(rows))
        return folder / "table.md"

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "write_table", write)
    for name, value in (("is_available", True), ("get_device_name", "no GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu_table, "benches", lambda: small_benches)
    monkeypatch.setattr(gpu_table, "measure_copy", lambda: 100.0)
    small = {"vocab_size": 50, "max_position_embeddings": 128}
    monkeypatch.setattr(
        gpu_decode,
        "random_duo",
        lambda: Duo(zoo.language_model("llama", **small), zoo.classifier("llama", **small)),
    )
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda model: model)
    # A machine that only measures has no git.
    monkeypatch.setenv("PATH", "")
    num_cases = len(small_benches if module is gpu_table else gpu_decode.CASES)
    with pytest.raises(SystemExit, match=f"1 of {num_cases} rows failed"):
        module.main(tmp_path)
    said = capsys.readouterr()
    assert "this kernel does not run" in said.err
    assert len(measured) == num_cases and f"'{num_cases}'" in said.out and "'2'" not in said.out


def test_a_table_names_its_commit_where_git_knows_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.commit_id() is None
    monkeypatch.setenv("PATH", "")
    assert runs.commit_id() is None
