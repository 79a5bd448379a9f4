"""`tq-fast eval` and `tq-fast report` on the embedded models: whole, stopped, wrong in part."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tq_fast
from tq_fast import presets
from tq_fast.cli.evaluate import EvalOptions, run_eval
from tq_fast.cli.report import run_report
from tq_fast.errors import InvalidArgument
from tq_fast.evaluation import work as eval_work
from tq_fast.evaluation.config_file import find_config, load_config
from tq_fast.evaluation.measures import diversity
from tq_fast.evaluation.work import EvalWorker
from tq_fast.jobs.record_file import OutputRefused
from tq_fast.models.tiny import gold_reward, load_tiny_world

CONFIG = """
title = "Quick"
seeds = [7]
batch_size = 1
traces = 1
resamples = 100
[prompts]
tiny = true
limit = 2
[models]
baseline = "tiny:baseline"
sft = "tiny:sft"
reward = "tiny:reward"
baseline_reward = "tiny:baseline_reward"
gold = "tiny:gold_reward"
device = "cpu"
[decode]
k = 3
num_rollouts = 2
horizon = 2
max_new_tokens = 6
beta = 0.5
[[setup]]
name = "one"
compare_with = ["baseline"]
ceiling = 8
method = [
    { method = "transfer_q", label = "TQ" },
    { method = "transfer_q_indirect", weights = "reward_gap" },
    { method = "controlled_decoding" },
    { method = "args", prior = "baseline" },
    { method = "best_of_n", n = 2 },
    { method = "dera" },
    { method = "direct_on_target", sweep = { num_rollouts = [1, 2] } },
    { method = "baseline" },
    { method = "sft" },
]
[[setup]]
name = "sparse"
models = { reward = { name = "tiny:baseline_reward", keep = 0.5 } }
method = [{ method = "transfer_q" }, { method = "baseline" }]
"""
POOL = "one/_ceiling"
NUM_RESPONSES = 2 * 12


class Results:
    """A folder of results and what was said while it was made."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.config = folder / "config.toml"
        self.config.write_text(config)
        self.output = folder / "results"
        self.said = ""

    def run(self, **options: Any) -> int:
        return self._listen(
            lambda console: run_eval(str(self.config), self.output, EvalOptions(**options), console)
        )

    def report(self) -> Path:
        return self._listen(lambda console: run_report(self.output, console))

    def _listen(self, job: Callable[[Console], Any]) -> Any:
        heard = io.StringIO()
        try:
            return job(Console(file=heard, width=80))
        finally:
            self.said = heard.getvalue()

    def records(self) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for path in sorted(self.output.glob("records/*/*.jsonl")):
            lines = path.read_text().splitlines()
            found[f"{path.parent.name}/{path.stem}"] = [json.loads(line) for line in lines]
        return found

    def responses(self) -> dict[str, dict[int, Any]]:
        """Return the records by method and index, without what depends on the machine."""
        kept = {}
        for name, records in self.records().items():
            by_index = {record["index"]: record for record in records}
            assert len(by_index) == len(records), f"{name} has a record twice"
            for record in records:
                for key in ("seconds", "cpu_seconds", "token_forwards"):
                    record.get("measures", {}).pop(key, None)
            kept[name] = dict(sorted(by_index.items()))
        return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """An evaluation that nothing disturbed."""
    results = Results(tmp_path_factory.mktemp("whole"))
    assert results.run() == 0
    return results


def test_every_method_has_a_record_a_prompt_with_its_measures(whole: Results) -> None:
    records = whole.records()
    assert len(records.pop(POOL)) == 2
    assert sum(map(len, records.values())) == NUM_RESPONSES
    prompts = load_tiny_world().prompts[:2]
    for name, own in records.items():
        assert [record["prompt"] for record in own] == list(prompts)
        for record in own:
            measures = record["measures"]
            assert record["seed"] == 7
            gold = gold_reward([record["prompt"]], [record["response"]])[0]
            assert measures["gold"] == pytest.approx(gold)
            assert measures["diversity"] == pytest.approx(diversity(record["response"].split()))
            assert measures["kl_to_sft"] == record["certificate"]["kl_to_sft"]
            assert measures["token_forwards"]
            is_traced = record["prompt_idx"] == 0 and "trace" in record
            steers = name.split("/")[1] not in ("sft", "baseline", "dera", "best_of_n")
            assert is_traced == (steers and record["prompt_idx"] == 0)


def test_the_target_of_the_set_up_scores_all_its_methods(whole: Results) -> None:
    records = whole.records()
    first, second = records["one/baseline"], records["sparse/baseline"]
    for ours, theirs in zip(first, second, strict=True):
        assert ours["response"] == theirs["response"]
        assert ours["measures"]["reward"] != pytest.approx(theirs["measures"]["reward"])


def test_the_summary_and_the_table_hold_the_means_of_the_records(whole: Results) -> None:
    summary = json.loads((whole.output / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["setups"][0]["methods"]}
    for name, row in rows.items():
        own = [record["measures"]["reward"] for record in whole.records()[f"one/{name}"]]
        assert row["metrics"]["reward"]["value"] == pytest.approx(sum(own) / len(own))
        assert row["responses"] == 2 and row["failed"] == 0
    kinds = {name: row["kl_kind"] for name, row in rows.items()}
    exact = {"args", "dera", "baseline", "sft"}
    assert kinds == {name: "exact" if name in exact else "at most" for name in rows}
    table = (whole.output / "table.md").read_text()
    assert "win-tie against baseline, %" in table and "| TQ |" in table
    assert json.loads((whole.output / "versions.json").read_text())["torch"]
    assert (whole.output / "config.toml").read_text() == CONFIG
    assert f"{NUM_RESPONSES + 2 * 8} responses; this run took" in whole.said


def test_the_ceiling_comes_from_sft_samples_that_the_target_scores(whole: Results) -> None:
    world = load_tiny_world()
    pool = load_config(whole.config).setups[0].pool
    (seed,) = pool.seeds((7,))
    for record, prompt in zip(whole.records()[POOL], world.prompts[:2], strict=True):
        drawn = presets.sft(
            prompt, sft=world.sft, num_return_sequences=8, max_new_tokens=6, seed=seed, device="cpu"
        )
        assert record["prompt"] == prompt and record["seed"] == seed
        assert record["token_ids"] == [ids.tolist() for ids in drawn.sequences]
        golds = gold_reward([prompt] * 8, drawn.texts)
        assert record["scores"]["gold"] == pytest.approx(golds, abs=1e-5)
        assert set(record["scores"]) == {"reward", "baseline_reward", "gold"}
    summary = json.loads((whole.output / "summary.json").read_text())
    ceiling = summary["setups"][0]["ceiling"]
    assert (ceiling["num_texts"], ceiling["num_prompts"]) == (8, 2)
    scores = [score for record in whole.records()[POOL] for score in record["scores"]["reward"]]
    first = ceiling["curves"]["reward"][0]
    assert first["value"] == pytest.approx(sum(scores) / 16) and first["is_trusted"]
    # The SFT model itself stands at its beginning; beyond it 8 samples say nothing.
    rows = {row["name"]: row for row in summary["setups"][0]["methods"]}
    assert rows["sft"]["ceiling"]["reward"] == pytest.approx(first["value"])
    assert rows["transfer_q"]["ceiling"] == {"reward": None, "gold": None}
    assert summary["setups"][1]["ceiling"] is None
    assert "highest reward at that KL" in (whole.output / "table.md").read_text()


def test_a_finished_evaluation_has_nothing_left_to_do(whole: Results) -> None:
    before = whole.responses()
    assert whole.run() == 0
    assert whole.responses() == before
    assert "this run took" not in whole.said


def test_killed_in_two_processes_it_goes_on_in_one_to_the_same_end(
    tmp_path: Path, whole: Results
) -> None:
    results = Results(tmp_path)
    command = [sys.executable, "-m", "tq_fast", "eval", str(results.config)]
    command += ["--output", str(results.output), "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while sum(map(len, results.records().values())) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # The workers find their connections closed, and end.
        while _is_alive(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if _is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    early = {path: path.read_bytes() for path in results.output.glob("records/*/*.jsonl")}
    assert results.run(workers=1) == 0
    assert results.responses() == whole.responses()
    assert "resuming: " in results.said
    for path, data in early.items():
        complete = data[: data.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(complete), "a finished record was touched"


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


SHORT = CONFIG[: CONFIG.index("[[setup]]")].replace(
    "tiny = true\nlimit = 2", 'file = "p.jsonl"'
) + ('[[setup]]\nname = "one"\nmethod = [{ method = "transfer_q" }, { method = "baseline" }]\n')


@pytest.fixture
def broken(tmp_path: Path) -> Results:
    """Three prompts, of which the second is too long for the models."""
    texts = ["How was the tea?", "How was the tea? " * 300, "How was the soup?"]
    lines = [json.dumps({"prompt": text}) for text in texts]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return Results(tmp_path, SHORT.replace("batch_size = 1", "batch_size = 3"))


def test_a_prompt_that_fails_is_an_error_record_and_the_rest_goes_on(broken: Results) -> None:
    assert broken.run() == 1
    for records in broken.responses().values():
        assert "token_ids" in records[0] and "token_ids" in records[2]
        assert "but the baseline model allows" in records[1]["error"]["message"]
    assert "one/transfer_q, prompt 1, seed 7 failed" in broken.said
    assert "2 failed; the same command with --retry-errors" in broken.said
    assert broken.run() == 1 and "this run took" not in broken.said
    assert broken.run(retry_errors=True) == 1 and "this run took" in broken.said


def test_an_error_that_is_every_prompts_ends_the_evaluation(
    broken: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OutputRefused("the disk is full")

    monkeypatch.setattr(eval_work, "measure_responses", fail)
    with pytest.raises(OutputRefused, match="the disk is full"):
        broken.run()


def test_results_of_other_settings_are_left_alone(broken: Results) -> None:
    assert broken.run() == 1
    before = broken.responses()
    text = broken.config.read_text()
    broken.config.write_text(text.replace("k = 3", "k = 4"))
    with pytest.raises(OutputRefused, match="k was 3, is 4"):
        broken.run()
    broken.config.write_text(text.replace("tiny:reward", "tiny:baseline_reward"))
    with pytest.raises(OutputRefused, match=r"scored by reward was 'tiny:reward'"):
        broken.run()
    assert broken.responses() == before
    assert broken.run(overwrite=True) == 1


def test_methods_of_two_versions_share_a_folder_only_where_the_user_says_so(
    broken: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        for module in ("cli.evaluate", "jobs.resume"):
            earlier.setattr(f"tq_fast.{module}.read_version", lambda: "0.1.0")
        assert broken.run() == 1
    # One method has all of its records, and the other one none.
    (broken.output / "records" / "one" / "transfer_q.jsonl").unlink()
    with pytest.raises(OutputRefused, match=r"was made by tq-fast 0\.1\.0, this is"):
        broken.run()
    assert broken.run(mix_versions=True) == 1
    made = {name: {r["tq_fast"] for r in records} for name, records in broken.records().items()}
    assert made == {"one/baseline": {"0.1.0"}, "one/transfer_q": {tq_fast.__version__}}


def test_results_of_another_evaluation_are_left_alone(broken: Results) -> None:
    assert broken.run() == 1
    before = broken.responses()
    text = broken.config.read_text()
    broken.config.write_text(text.replace('name = "one"', 'name = "two"'))
    with pytest.raises(OutputRefused, match="has not: one/baseline, one/transfer_q"):
        broken.run()
    assert broken.responses() == before
    assert broken.config.read_text() != (broken.output / "config.toml").read_text()
    assert broken.run(overwrite=True) == 1
    assert set(broken.responses()) == {"two/baseline", "two/transfer_q"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tiny:reward", "tiny:rewards", r"there is no 'tiny:rewards'; did you mean 'reward'"),
        ("tiny:sft", "./nowhere", "there is no such folder"),
        ('device = "cpu"', 'device = "gpu9"', "device 'gpu9' cannot be used"),
        ('file = "p.jsonl"', 'file = "q.jsonl"', "q.jsonl' cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    broken: Results, old: str, new: str, message: str
) -> None:
    broken.config.write_text(broken.config.read_text().replace(old, new))
    with pytest.raises(InvalidArgument, match=message):
        broken.run()
    assert not any(broken.output.glob("records/*/*.jsonl"))


def test_an_output_that_is_a_file_is_refused(broken: Results) -> None:
    broken.output.write_text("mine")
    with pytest.raises(OutputRefused, match="cannot be written"):
        broken.run()
    assert broken.output.read_text() == "mine"


class _Links(HTMLParser):
    """Collects the addresses that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_file_with_every_picture_in_it(whole: Results) -> None:
    pytest.importorskip("matplotlib")
    page = whole.report().read_text()
    links = _Links()
    links.feed(page)
    pictures = sorted(path.name for path in (whole.output / "pictures").glob("*.png"))
    assert pictures == [
        "one-estimates.png",
        "one-num_rollouts.png",
        "one-quality.png",
        "one-reward.png",
        "one-shift.png",
        "one-trace.png",
        "sparse-shift.png",
        "sparse-trace.png",
    ]
    assert len(links.sources) == len(pictures)
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    record = whole.records()["one/transfer_q"][0]
    for step in record["trace"]:
        assert step["texts"][step["choice"]].strip() in page
    assert record["response"].split()[0] in page and "Reward by method" in page


@pytest.mark.parametrize("name", ["tiny", "tiny-ablations", "frontier"])
def test_the_shipped_configurations_pass_every_check_before_decoding(name: str) -> None:
    config = load_config(find_config(name))
    worker = EvalWorker(config, config.prompts.read())
    assert len(worker.entries) == 64
    for setup in config.setups:
        worker.models_of(setup)
        for method in setup.jobs:
            # A value head is fitted first, which takes a minute.
            if method.own.get("value") is None:
                worker.check(method)


def test_a_folder_without_results_has_no_report(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(InvalidArgument, match=r"there is no config\.toml in it"):
        results.report()
