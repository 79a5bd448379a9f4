"""Records: what a response says of its stages and steps, and the texts that are read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tq_fast.errors import InvalidArgument
from tq_fast.jobs.prompt_file import PromptEntry
from tq_fast.jobs.records import response_record
from tq_fast.jobs.texts import RecordedTexts, read_texts
from tq_fast.results import Certificate, PromptResult, StageTrace, StepTrace

ENTRY = PromptEntry(0, None, "a", {"stages": "theirs"})
STAGES = [
    StageTrace(0, torch.tensor([0.5, 1.5]), 1, [[5, 6], [7]]),
    StageTrace(1, torch.tensor([float("nan"), 1.0]), None),
]


def step(**changes: Any) -> StepTrace:
    one = torch.tensor([0.25])
    known = StepTrace(
        torch.tensor([7]),
        one[None],
        one,
        one,
        one,
        one,
        one,
        kl_to_sft=0.5,
        kl_to_baseline=None,
        choice=0,
    )
    return dataclasses.replace(known, **changes)


def result(stages: list[StageTrace], *trace: StepTrace) -> PromptResult:
    certificate = Certificate(0.0, 0.0, 0.0, "sft", None)
    return PromptResult("b", torch.tensor([7]), list(trace) or [step()], certificate, stages)


def test_stages_are_recorded_and_their_texts_where_they_are_asked_for() -> None:
    first = {"cut": 0, "rewards": [0.5, 1.5], "choice": 1}
    second = {"cut": 1, "rewards": [None, 1.0], "choice": None}
    plain = response_record(ENTRY, [result(STAGES)], traces=False)
    assert plain["stages"] == [first, second]
    assert plain["extra"] == {"stages": "theirs"}
    whole = [{**first, "sequences": [[5, 6], [7]]}, second]
    assert response_record(ENTRY, [result(STAGES)], traces=True)["stages"] == whole
    assert response_record(ENTRY, [result(STAGES)], traces=False, texts=True)["stages"] == whole
    assert "stages" not in response_record(ENTRY, [result([])], traces=True)


def test_a_response_that_was_drawn_alone_is_a_stage_where_texts_are_kept() -> None:
    record = response_record(ENTRY, [result([])], traces=False, texts=True)
    assert record["stages"] == [{"cut": 0, "rewards": [0.25], "choice": 0, "sequences": [[7]]}]


def test_a_step_has_value_and_agents_only_where_they_are_known() -> None:
    (plain,) = response_record(ENTRY, [result([])], traces=True)["trace"]
    assert not {"value", "agents"} & set(plain)
    known = step(value=0.123456789, agents=torch.tensor([1]))
    (full,) = response_record(ENTRY, [result([], known)], traces=True)["trace"]
    assert full["value"] == 0.1234568 and full["agents"] == [1]


def test_texts_are_read_back_by_prompt(tmp_path: Path) -> None:
    best = response_record(ENTRY, [result(STAGES[:1])] * 2, traces=False, texts=True)
    plain = response_record(dataclasses.replace(ENTRY, index=1), [result([])] * 2, traces=False)
    path = tmp_path / "out.jsonl"
    failed = {"index": 2, "prompt": "c", "error": {}}
    lines = [json.dumps(record) for record in (plain, failed, best)]
    path.write_text("\n".join([*lines, "[1]", '{"index": 3']))
    assert read_texts(path) == [
        RecordedTexts(0, "a", [[5, 6], [7]] * 2, [0.5, 1.5] * 2),
        RecordedTexts(1, "a", [[7], [7]], None),
    ]
    path.write_text(json.dumps(failed))
    with pytest.raises(InvalidArgument, match="hold no texts that a head can be fitted to"):
        read_texts(path)
