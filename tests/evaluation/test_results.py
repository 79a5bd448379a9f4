"""Summaries and tables of records that were written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tq_fast.evaluation.config import EvalConfig
from tq_fast.evaluation.config_file import load_config
from tq_fast.evaluation.results import format_interval, summarise, write_table

CONFIG = """
title = "By hand"
seeds = [0, 1]
[prompts]
tiny = true
[models]
baseline = "tiny:baseline"
sft = "tiny:sft"
reward = "tiny:reward"
[[setup]]
name = "s"
compare_with = ["sft"]
models = { gold = "tiny:gold_reward" }
method = [
    { method = "transfer_q" },
    { method = "best_of_n", n = 4 },
    { method = "best_of_n", name = "bon", label = "best", source = "sft", sweep = { n = [1, 2] } },
    { method = "baseline" },
    { method = "sft" },
]
"""


def record(
    prompt: int, seed: int, reward: float, gold: float, kl: float = 1.0, kind: str = "exact"
) -> dict[str, Any]:
    measures = {"reward": reward, "gold": gold, "kl_to_sft": kl, "coherence": None}
    measures |= {"token_forwards": {"sft": 2.0, "reward": 3.0}, "cpu_seconds": 0.5}
    place = {"prompt_idx": prompt, "seed": seed, "index": 2 * seed + prompt}
    certificate = {"kl_to_sft": kl, "kl_kind": kind}
    return {
        **place,
        "token_ids": [1, 2],
        "steps": 2,
        "certificate": certificate,
        "measures": measures,
    }


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return load_config(path)


@pytest.fixture
def summary(config: EvalConfig) -> dict[str, Any]:
    error = {"prompt_idx": 1, "seed": 1, "index": 3, "error": {"type": "X", "message": "m"}}
    records = {
        ("s", "transfer_q"): [record(0, 0, 4.0, 1.0), record(1, 0, 2.0, 0.0), error],
        ("s", "baseline"): [record(0, 0, 1.0, 2.0), record(1, 0, 3.0, 0.5), record(1, 1, 9.0, 9.0)],
        ("s", "sft"): [record(0, 0, 0.0, 1.0), record(1, 0, -2.0, 0.5)],
    }
    return summarise(config, records)


def metrics(summary: dict[str, Any], method: str) -> dict[str, Any]:
    return next(m["metrics"] for m in summary["setups"][0]["methods"] if m["name"] == method)


def test_means_differences_and_ratios_are_those_of_the_shared_prompts(summary: dict) -> None:
    ours = metrics(summary, "transfer_q")
    assert ours["reward"]["value"] == pytest.approx(3.0)
    # The baseline has 1 and 3 on these prompts; its third response has no counterpart.
    assert ours["gain"]["value"] == pytest.approx(1.0)
    assert ours["gain"]["low"] == pytest.approx(-1.0) and ours["gain"]["high"] == pytest.approx(3.0)
    assert ours["normalised"]["value"] == pytest.approx(1.5)
    assert ours["token_forwards"]["value"] == pytest.approx(5.0)
    assert ours["tokens"]["value"] == 2.0
    # The SFT model has 0 and -2, prompt by prompt.
    assert ours["gain:sft"] == {"value": 4.0, "low": 4.0, "high": 4.0}


def test_the_gold_reward_judges_where_there_is_no_other_judge(summary: dict) -> None:
    assert summary["setups"][0]["judge"] == "gold"
    # The tie of 1 and 1 counts as won; 0 against 0.5 is lost.
    assert metrics(summary, "transfer_q")["win_tie:sft"]["value"] == pytest.approx(50.0)
    assert "win_tie:sft" not in metrics(summary, "sft")


def test_failed_responses_are_counted_and_enter_no_mean(summary: dict) -> None:
    row = summary["setups"][0]["methods"][0]
    assert (row["responses"], row["failed"]) == (2, 1)


def test_a_measure_that_nobody_has_is_left_out(summary: dict) -> None:
    assert "coherence" not in metrics(summary, "transfer_q")
    assert metrics(summary, "best_of_n") == {}
    table = write_table(summary)
    assert "coherence" not in table and "| TQ" not in table
    assert "| transfer_q | 3.00 [2.00, 4.00] | 1.00 [-1.00, 3.00] |" in table


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [
        (["exact", "exact"], "| 2.50 [2.50, 2.50] |"),
        (["exact", "at most"], "| ≤ 2.50 [2.50, 2.50] |"),
        (["approximate", "at most"], "| ≲ 2.50 [2.50, 2.50] |"),
    ],
)
def test_a_divergence_that_is_a_bound_is_marked_as_its_certificates_say(
    config: EvalConfig, kinds: list[str], shown: str
) -> None:
    own = [record(idx, 0, 1.0, 1.0, kl=2.5, kind=kind) for idx, kind in enumerate(kinds)]
    records = {("s", "transfer_q"): own}
    table = write_table(summarise(config, records))
    assert shown in next(line for line in table.splitlines() if line.startswith("| transfer_q"))


def test_a_record_that_does_not_say_what_its_divergence_is_counts_as_a_bound(
    config: EvalConfig,
) -> None:
    old = record(0, 0, 1.0, 1.0)
    del old["certificate"]["kl_kind"]
    rows = summarise(config, {("s", "sft"): [old]})["setups"][0]["methods"]
    assert next(row["kl_kind"] for row in rows if row["name"] == "sft") == "at most"


def test_methods_are_held_against_best_of_n_from_one_model_at_equal_cost(
    config: EvalConfig,
) -> None:
    records = {
        ("s", "transfer_q"): [record(0, 0, 4.0, 1.0), record(1, 0, 2.0, 0.0)],
        ("s", "bon-n=1"): [record(0, 0, 1.0, 2.0), record(1, 0, 3.0, 0.5)],
        ("s", "bon-n=2"): [record(0, 0, 2.0, 2.0), record(1, 0, 3.5, 0.5)],
    }
    for one in records[("s", "bon-n=2")]:
        one["measures"]["token_forwards"] = {"sft": 10.0}
    summary = summarise(config, records)
    (comparison,) = summary["setups"][0]["equal_cost"]
    assert comparison["line"] == "best"
    (one,) = comparison["methods"]
    assert one["name"] == "transfer_q" and one["measures"]["reward"]["kind"] == "equal"
    assert one["measures"]["reward"]["over"]["value"] == pytest.approx(1.0)
    assert "Against best at equal token-forwards" in write_table(summary)


def test_intervals_as_cells() -> None:
    found = {"value": 0.51234, "low": 0.4, "high": 0.6}
    assert format_interval(found, "reward") == "0.51 [0.40, 0.60]"
    assert format_interval(found, "diversity") == "0.512 [0.400, 0.600]"
    assert format_interval({"value": 12345.6, "low": 0, "high": 0}, "token_forwards") == "12,346"
    assert format_interval({"value": -0.001, "low": -0.1, "high": 0.1}, "reward").startswith(
        "0.00 ["
    )
