"""`tq-fast eval` with value heads, refinement, blocks and Collab on the embedded models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_evaluate import Results
from tq_fast.cli import evaluate
from tq_fast.errors import InvalidArgument
from tq_fast.evaluation.processes import run_here
from tq_fast.jobs.record_file import OutputRefused
from tq_fast.models.tiny import load_tiny_world, other_prompts
from tq_fast.values.head import ValueHead

CONFIG = """
title = "Values"
seeds = [7]
batch_size = 2
traces = 0
resamples = 50
[prompts]
tiny = true
limit = 2
[models]
baseline = "tiny:baseline"
sft = "tiny:sft"
reward = "tiny:reward"
device = "cpu"
[decode]
k = 2
horizon = 2
max_new_tokens = 6
[values.head]
prompts = { tiny_others = 6 }
source = "baseline"
num_texts = 3
epochs = 2
[[setup]]
name = "one"
method = [
    { method = "value_guided", value = "head", alpha = 0.25 },
    { method = "best_of_n", name = "bon-value", source = "value", value = "head", n = 2 },
    { method = "refine", source = "value", value = "head", first = 2, branches = 2, stages = 1 },
    { method = "refine", name = "refine-sft", source = "sft", first = 2, branches = 2, stages = 1 },
    { method = "blocks", branches = 2, block_len = 3 },
    { method = "collab", baselines = ["tiny:baseline", "tiny:sft"] },
    { method = "best_of_n", name = "bon", source = "baseline", sweep = { n = [1, 2] } },
]
"""
TEXTS = "values/one/head/records/one-head/texts.jsonl"
HEAD = "values/one/head/head"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """An evaluation that nothing disturbed."""
    results = Results(tmp_path_factory.mktemp("values"), CONFIG)
    assert results.run() == 0
    return results


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_head_is_fitted_to_texts_of_other_prompts(whole: Results) -> None:
    texts = lines_of(whole.output / TEXTS)
    assert sorted(record["prompt"] for record in texts) == sorted(other_prompts(6))
    assert not {record["prompt"] for record in texts} & set(load_tiny_world().prompts)
    for record in texts:
        (stage,) = record["stages"]
        assert len(stage["sequences"]) == len(stage["rewards"]) == 3
        # Nothing is drawn from the SFT model, and nothing measured against it.
        assert set(record["measures"]["token_forwards"]) == {"baseline", "reward"}
    head = ValueHead.load(whole.output / HEAD)
    assert head.config.fit["prior"] == "sft" and head.config.fit["prompts"] == 6
    assert "one/head: epoch 2/2, held-out R2" in whole.said


def test_every_method_has_its_records_and_the_summary_knows_the_head(whole: Results) -> None:
    records = whole.records()
    assert {name for name, own in records.items() if len(own) == 2} == set(records)
    assert len(records) == 8
    refined = records["one/refine"][0]
    assert [len(stage["rewards"]) for stage in refined["stages"]] == [2, 2]
    assert "sequences" not in refined["stages"][0]
    assert refined["certificate"]["kl_kind"] == "approximate"
    summary = json.loads((whole.output / "summary.json").read_text())
    (head,) = summary["values"]
    assert (head["num_texts"], head["prompts"], head["source"]) == (18, 6, "baseline")
    spent = [record["measures"]["token_forwards"] for record in lines_of(whole.output / TEXTS)]
    assert head["token_forwards"] == pytest.approx(sum(sum(one.values()) for one in spent))
    assert "Value head one/head: fitted to 18 texts" in (whole.output / "table.md").read_text()


def test_models_that_only_measure_do_not_count_as_cost(whole: Results) -> None:
    summary = json.loads((whole.output / "summary.json").read_text())
    rows = {row["name"]: row["metrics"] for row in summary["setups"][0]["methods"]}
    for name, roles in (("bon-n=2", {"baseline", "reward"}), ("value_guided", {"sft"})):
        counts = [r["measures"]["token_forwards"] for r in whole.records()[f"one/{name}"]]
        assert set(counts[0]) - roles, "another model has measured"
        expected = sum(count[role] for count in counts for role in roles) / 2
        assert rows[name]["token_forwards"]["value"] == pytest.approx(expected)


def test_a_head_that_is_there_is_not_fitted_again(whole: Results) -> None:
    head = whole.output / HEAD / "model.safetensors"
    before = head.stat().st_mtime_ns, whole.responses()
    assert whole.run() == 0
    assert (head.stat().st_mtime_ns, whole.responses()) == before
    assert "epoch" not in whole.said


def test_other_settings_of_a_head_are_refused(whole: Results) -> None:
    text = whole.config.read_text()
    try:
        for old, new, message in (
            ("epochs = 2", "epochs = 3", r"one/head was fitted with other settings: epochs was 2"),
            ("num_texts = 3", "num_texts = 4", r"n was 3, is 4"),
        ):
            whole.config.write_text(text.replace(old, new))
            with pytest.raises(OutputRefused, match=message):
                whole.run()
    finally:
        whole.config.write_text(text)


def test_texts_that_were_drawn_before_it_stopped_are_kept(
    tmp_path: Path, whole: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path, CONFIG)

    def stop_early(worker: object, tasks: list, on_record: object) -> None:
        run_here(worker, tasks[:1], on_record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run_here", stop_early)
        assert results.run() == 130
    assert "stopped; the same command goes on" in results.said
    assert len(lines_of(results.output / TEXTS)) == 2
    assert not (results.output / HEAD).exists() and not any(results.records().values())
    assert results.run() == 0
    assert "resuming: 2 of 6 prompts are done" in results.said
    assert results.responses() == whole.responses()


def test_prompts_that_are_evaluated_are_not_fitted_on(tmp_path: Path) -> None:
    world = load_tiny_world()
    prompts = [*other_prompts(3), world.prompts[1]]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    results = Results(tmp_path, CONFIG.replace("tiny_others = 6", 'file = "p.jsonl"'))
    with pytest.raises(
        InvalidArgument, match=r"values\.head: prompt 3 is one of those that are ev"
    ):
        results.run()


def test_overwrite_fits_again(tmp_path: Path) -> None:
    short = CONFIG[: CONFIG.index('    { method = "best_of_n"')] + "]\n"
    results = Results(tmp_path, short)
    assert results.run() == 0
    results.config.write_text(short.replace("epochs = 2", "epochs = 1"))
    assert results.run(overwrite=True) == 0
    assert "epoch 1/1" in results.said
    assert ValueHead.load(results.output / HEAD).config.fit["epochs"] == 1
