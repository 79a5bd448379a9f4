"""The code of bench/gpu_trio.py on small models of the CPU: only clock and size need a GPU."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from bench import gpu_trio
from bench.gpu_trio import Case, Shape, Trio

SMALL = Shape(num_layers=2, hidden=32, intermediate=48, num_heads=4, vocab_size=50)
PHASES = {"candidates", "rollout", "reward", "reweight", "commit"}


@pytest.fixture
def trio(monkeypatch: pytest.MonkeyPatch) -> Trio:
    monkeypatch.setattr(gpu_trio, "prompt_of", lambda length: torch.arange(length) % 50)
    monkeypatch.setattr(gpu_trio, "K", 3)
    monkeypatch.setattr(gpu_trio, "HORIZON", 4)
    return gpu_trio.random_trio(SMALL, "cpu")


def test_the_weights_of_a_pass_are_those_of_the_models(trio) -> None:
    def nbytes(model: torch.nn.Module, kind: str) -> int:
        weights = [weight for name, weight in model.named_parameters() if kind in name]
        return sum(weight.nbytes for weight in weights if weight.dim() == 2)

    for model in (trio.baseline, trio.sft, trio.reward):
        assert nbytes(model, ".layers.") == SMALL.body_bytes
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert nbytes(trio.baseline, "lm_head") == nbytes(trio.sft, "lm_head") == SMALL.head_bytes
    storages = [
        {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        for model in (trio.baseline, trio.sft, trio.reward)
    ]
    assert not storages[0] & storages[1] and not storages[1] & storages[2]
    own, other = trio.baseline.lm_head.weight, trio.sft.lm_head.weight
    assert not torch.equal(own, other) and own.float().std() > 0.01


def test_the_least_bytes_are_those_that_were_counted_by_hand() -> None:
    shape = Shape()
    assert shape.kv_bytes == 524_288
    assert shape.body_bytes == 12_952_010_752
    for prompt, billions in ((512, 298), (4096, 339)):
        nbytes = gpu_trio.least_bytes(shape, prompt=prompt, rows=10, horizon=20)
        assert round(nbytes / 1e9) == billions
    assert gpu_trio.least_passes(20) == 22
    # One row of one token: a pass of each model over prompt and token.
    one = gpu_trio.least_bytes(SMALL, prompt=9, rows=1, horizon=1)
    passes = 3 * (SMALL.body_bytes + 9 * SMALL.kv_bytes) + 2 * SMALL.head_bytes
    assert one == passes + 2 * SMALL.kv_bytes


def test_the_decode_takes_the_passes_that_the_least_bytes_are_of(trio) -> None:
    result = gpu_trio.decode(trio, Case(9, graphs=True), 3)
    stats = result.stats
    assert stats.rollout_steps == 3 * gpu_trio.HORIZON
    assert stats.token_forwards["sft"] == 9 + 2


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], None),
        ([(3.0, 3.0)], None),
        ([(1.0, 2.0)], 0.0),
        ([(4.0, 5.0), (1.0, 2.0)], 0.5),
        ([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (9.0, 10.0)], 0.4),
    ],
)
def test_the_idle_share_is_what_no_span_covers(spans, share) -> None:
    assert gpu_trio.idle_share(spans) == pytest.approx(share)


def test_the_rows_fill_their_table_and_leave_a_trace(trio, tmp_path) -> None:
    cases = [Case(9, graphs=True), Case(9, graphs=False)]
    rows = [gpu_trio.measure(trio, SMALL, 100.0, tmp_path, case) for case in cases]
    for row in rows:
        assert row["phases_ms"].keys() == PHASES
        assert row["phases_by_events_ms"].keys() == PHASES | {"prefill"}
        assert row["ms"] > 0 and row["idle_share"] is None
        nbytes = gpu_trio.least_bytes(SMALL, prompt=9, rows=3, horizon=4)
        assert row["share"] == pytest.approx(nbytes / 100e9 / (row["ms"] / 1e3))
    run = {"date": "2026-01-01", "machine": "no GPU"}
    table = gpu_trio.write_table(tmp_path, run, rows).read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 9 | graphs | ")
    with gzip.open(tmp_path / rows[0]["trace"]) as trace:
        assert json.load(trace)["traceEvents"]
    assert "trace" not in rows[1]


def test_a_device_that_is_too_small_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    gpu_trio.require_memory(Shape())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40e9, 80e9))
    with pytest.raises(SystemExit, match=r"needs 5. GB of device memory, 40 GB are free"):
        gpu_trio.require_memory(Shape())


def test_the_program_measures_every_case(trio, monkeypatch, tmp_path) -> None:
    for name, value in (("is_available", True), ("get_device_name", "no GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_trio, "require_memory", lambda shape: None)
    monkeypatch.setattr(gpu_trio, "measure_copy", lambda: 100.0)
    monkeypatch.setattr(gpu_trio, "random_trio", lambda shape, device: trio)
    measured = []

    def measure(models, shape, copy, folder, case):
        measured.append(case)
        assert (models, shape, copy, folder) == (trio, Shape(), 100.0, tmp_path)
        return {"prompt": case.prompt}

    monkeypatch.setattr(gpu_trio, "measure", measure)

    def write(folder, run, rows):
        (folder / "table.md").write_text(f"{run} {rows}")
        return folder / "table.md"

    monkeypatch.setattr(gpu_trio, "write_table", write)
    gpu_trio.main(tmp_path)
    assert measured == gpu_trio.CASES
    written = (tmp_path / "table.md").read_text()
    assert "4096" in written and "random weights of their own" in written
