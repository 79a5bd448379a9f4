"""The harness of bench/peers without vLLM: the pipe, the turns, the checks and the table."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.peers.__main__ as peers
from bench.decode_models import Duo
from bench.peers import checks, measure
from bench.peers.cases import Case, all_cases
from bench.peers.measure import Row
from bench.peers.serving import Channel, serve
from bench.peers.table import table
from bench.peers.tq_fast_worker import TqFastWorker
from bench.peers.workers import ROOT, Worker, WorkerFailed
from tests import zoo

ECHO = """
import sys, time
from bench.peers.serving import Channel, serve, take_stdout
answers = take_stdout()
print("a library talks on stdout")

def clock():
    return {"seconds": time.process_time()}

def fail():
    raise ValueError("a broken handler")

def leave():
    sys.stderr.write("out of memory")
    sys.stderr.flush()
    raise SystemExit

serve(Channel(sys.stdin, answers), {"clock": clock, "fail": fail, "leave": leave})
"""


def step(q=(0.5, 0.25), choice=7, candidates=(7, 9), prior=(-1.0, -2.0)) -> dict[str, object]:
    return {"candidates": [*candidates], "prior": [*prior], "q": [*q], "choice": choice}


def scripted(answers: dict[str, list[dict[str, object]]]) -> Worker:
    """A worker that gives these answers, by command."""

    class Scripted:
        def call(self, command: str, **arguments: object) -> dict[str, object]:
            left = answers[command]
            return left.pop(0) if len(left) > 1 else left[0]

    return Scripted()


def decoding(seconds: list[float], steps: list[list[dict[str, object]]]) -> Worker:
    turns = [{"seconds": [s, s], "phases": {"rollout": 2 * s}} for s in seconds]
    return scripted({"begin": [{}], "decode": turns, "end": [{"steps": steps}]})


def test_answers_and_errors_come_back_whatever_else_is_printed() -> None:
    with Worker("echo", [sys.executable, "-c", ECHO], {}) as worker:
        assert worker.call("clock")["seconds"] > 0
        with pytest.raises(WorkerFailed, match="a broken handler"):
            worker.call("fail")
        assert worker.call("clock")["seconds"] > 0
        with pytest.raises(WorkerFailed, match=r"(?s)ended at 'leave'.*out of memory"):
            worker.call("leave")
        worker._process.wait()
        # Nobody reads this command; that it cannot be delivered is no error of its own at the end.
        with pytest.raises(WorkerFailed, match="ended at 'clock'"):
            worker.call("clock")


def test_a_failed_side_ends_both_workers_and_the_next_case_begins_with_new_ones(
    monkeypatch, tmp_path
) -> None:
    live: list[str] = []
    began: list[str] = []

    @contextlib.contextmanager
    def running(args, folder, dtype):
        began.append(dtype)
        live.append(dtype)
        try:
            yield {}
        finally:
            live.remove(dtype)

    def fail_once(workers, case, **options) -> Row:
        if len(began) == 1:
            raise WorkerFailed("vLLM ended")
        return Row(case, {side: [1.0] for side in measure.SIDES}, 1, "the same")

    monkeypatch.setattr(peers, "running", running)
    monkeypatch.setattr(peers, "describe", lambda workers, args: {})
    monkeypatch.setattr(peers, "measure", fail_once)
    cases = [Case("encode", dtype, 512, 1) for dtype in ("fp32", "fp32", "fp32", "bf16")]
    comparison = peers.Comparison(peers.parse([]), tmp_path, tmp_path / "table")
    with pytest.raises(SystemExit, match="1 of 4 rows failed"):
        comparison.run(cases)
    assert began == ["fp32", "fp32", "bf16"] and not live


def test_a_worker_is_stopped_between_its_turns() -> None:
    with Worker("echo", [sys.executable, "-c", ECHO], {}) as worker:
        worker.call("clock")
        state = Path(f"/proc/{worker._process.pid}/stat")
        if not state.exists():
            pytest.skip("no /proc here")
        # The signal is on its way when `call` returns.
        for _ in range(100):
            if state.read_text().rpartition(")")[2].split()[0] == "T":
                break
            time.sleep(0.01)
        assert state.read_text().rpartition(")")[2].split()[0] == "T"
    assert worker._process.returncode == -9
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


def test_the_worker_of_vllm_imports_nothing_that_its_environment_lacks() -> None:
    folder = ROOT / "bench" / "peers"
    found = set()
    for name in ("vllm_worker.py", "serving.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(
                    node.module if node.module.startswith("bench") else node.module.split(".")[0]
                )
    found -= set(sys.stdlib_module_names)
    assert found == {"torch", "vllm", "bench.peers.serving"}


def test_q_that_differs_is_no_figure() -> None:
    sides = {
        "tq_fast": decoding([0.5, 0.5], [[step()]]),
        "vLLM": decoding([1.0, 1.0], [[step(q=(0.5, 0.2502))]]),
    }
    with pytest.raises(checks.Disagreement, match=r"prompt 0, step 0: Q differs by 0\.0002"):
        measure.measure(sides, Case("transfer", "fp32", 512, 1), turns=2, steps=2)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (step(candidates=(9, 7)), "candidates"),
        (step(choice=9), "tokens 7 and 9"),
        (step(q=(0.5, float("nan"))), "Q differs by nan"),
    ],
)
def test_fp32_must_agree_in_everything(other, said) -> None:
    with pytest.raises(checks.Disagreement, match=said):
        checks.check_transfer([[step()]], [[other]], dtype="fp32")


def test_bf16_may_differ_by_near_ties_and_is_followed_to_the_first_other_token() -> None:
    near = step(candidates=(7, 8), prior=(-1.0, -2.03), choice=8, q=(0.5, 3.0))
    far = step(candidates=(1, 2))
    said = checks.check_transfer([[step(), step()]], [[near, far]], dtype="bf16")
    assert said.startswith("0 of 1 choices the same") and said.endswith("1 responses parted")
    with pytest.raises(checks.Disagreement, match=r"candidate 9 \(-2\.000\) is missing"):
        missing = step(candidates=(7, 8), prior=(-1.0, -2.3))
        checks.check_transfer([[step()]], [[missing]], dtype="bf16")


def test_an_encoding_and_a_draw_are_checked() -> None:
    token = {"seconds": 0.1, "next_token": 3}
    sides = {"tq_fast": scripted({"encode": [token]})}
    sides["vLLM"] = scripted({"encode": [token | {"next_token": 4}]})
    with pytest.raises(checks.Disagreement, match="the next tokens are 3 and 4"):
        measure.measure(sides, Case("encode", "fp32", 512, 1), turns=1, steps=1)
    said = measure.measure(sides, Case("encode", "bf16", 512, 1), turns=2, steps=1).agreement
    assert said == "another next token after 2 of 2 prompts (a tie in bf16)"
    draw = {"seconds": 1.0, "lengths": [64] * 7 + [63]}
    sides = {side: scripted({"sample": [draw]}) for side in measure.SIDES}
    with pytest.raises(checks.Disagreement, match="8 responses of 64 tokens were expected"):
        measure.measure(sides, Case("sample", "fp32", 128, 8), turns=1, steps=1)


def test_the_table_shows_rates_ratios_their_spread_and_losses() -> None:
    sides = {
        "tq_fast": decoding([0.5, 0.4, 0.6], [[step()]] * 8),
        "vLLM": decoding([1.0, 1.2, 0.9], [[step()]] * 8),
    }
    won = measure.measure(sides, Case("transfer", "fp32", 512, 8), turns=3, steps=2)
    lost = Row(Case("encode", "bf16", 512, 1), {"tq_fast": [2.0], "vLLM": [1.0]}, 512, "the same")
    lines = table({"machine": "a test"}, [won, lost]).splitlines()
    assert lines[0] == "machine: a test"
    words = [" ".join(line.split()) for line in lines]
    assert "Transfer Q*, 8 x 512, fp32 16.0 8.000 2.00 2.25 [1.50, 3.00]" in words
    assert "encoding, 512, bf16 256.0 512.0 0.50 0.50 [0.50, 0.50]" in words
    assert len({line.index("  [") for line in lines if "  [" in line}) == 1
    assert "tq_fast is faster in 1 of 2 cases; slower in" in lines
    assert "  tq_fast       500.0 a step: roll-outs 500.0" in lines


def test_a_decode_of_tq_fast_goes_on_from_turn_to_turn(tmp_path: Path) -> None:
    small = {"vocab_size": 50, "max_position_embeddings": 128}
    duo = Duo(zoo.language_model("llama", **small), zoo.classifier("llama", **small))
    commands = [{"command": "decode", "num_steps": 2}, {"command": "end"}]
    source = io.StringIO("".join(json.dumps(message) + "\n" for message in commands))
    answers = io.StringIO()
    channel = Channel(source, answers)
    duo.baseline.save_pretrained(tmp_path / "baseline")
    duo.reward.save_pretrained(tmp_path / "reward")
    worker = TqFastWorker(str(tmp_path), "fp32", channel)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    settings = {"k": 3, "horizon": 2, "alpha": 1.0, "warm_steps": 1, "max_steps": 3}
    last = worker.begin(prompts, settings)
    channel.send(last)
    serve(channel, {"end": worker.end})
    first, second, end = map(json.loads, answers.getvalue().splitlines())
    assert len(first["seconds"]) == 1 and "prefill" in first["phases"]
    assert len(second["seconds"]) == 2 and "prefill" not in second["phases"]
    assert [len(steps) for steps in end["steps"]] == [3, 3]
    with torch.inference_mode():
        logits = duo.baseline(torch.tensor([prompts[1]])).logits[0, -1]
    assert end["steps"][1][0]["candidates"] == logits.topk(3).indices.tolist()
    for _ in range(2):
        assert worker.encode(prompts[1])["next_token"] == int(logits.argmax())
    assert worker.sample(prompts[0], 3, 4)["lengths"] == [4, 4, 4]


def test_options_choose_the_cases() -> None:
    args = peers.parse(["--kind", "transfer", "--dtype", "bf16", "--number", "8"])
    assert peers.chosen(all_cases(), args) == [
        Case("transfer", "bf16", 512, 8),
        Case("transfer", "bf16", 3072, 8),
    ]
    assert len(peers.chosen(all_cases(), peers.parse([]))) == 18
