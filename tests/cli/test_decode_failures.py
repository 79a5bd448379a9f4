"""`tq-fast decode` where something fails: a prompt, a reward, the memory, the disk, the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.cli.decode_job import Job
from tests.cli.trio import MAX_POSITIONS
from tq_fast import DecodeConfig
from tq_fast.errors import RewardError
from tq_fast.jobs.record_file import OutputRefused, RecordFile
from tq_fast.jobs.resume import ModelChoice
from tq_fast.prompts import Prompt
from tq_fast.rewards.base import Opening, RewardSession, drop_from

# Takes prompts and their scores; changes the scores of some prompts, or raises.
Trouble = Callable[[Sequence[Prompt], list[float]], list[float]]


class _TroubledSession:
    def __init__(self, session: RewardSession, prompts: Sequence[Prompt], meet: Trouble) -> None:
        self.session, self.prompts, self.meet = session, list(prompts), meet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        return self.meet([self.prompts[t] for t in trees], self.session.score(trees, responses))

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.session.replace_tree(tree, prompt)
        self.prompts[tree] = prompt

    def drop_tree(self, tree: int) -> None:
        self.session.drop_tree(tree)
        drop_from(self.prompts, tree)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trouble | None], None]:
    """Makes every reward that is loaded afterwards meet prompts with trouble, or with none."""
    load = ModelChoice.load

    def set_trouble(meet: Trouble | None) -> None:
        def load_with_trouble(models: ModelChoice, config: DecodeConfig) -> Any:
            method = load(models, config)
            if meet is not None:
                reward = method.session.rewards["reward"]
                open_reward = reward.open

                def open_with_trouble(opening: Opening) -> Any:
                    return _TroubledSession(open_reward(opening), opening.prompts, meet)

                reward.open = open_with_trouble
            return method

        monkeypatch.setattr(ModelChoice, "load", load_with_trouble)

    return set_trouble


def _nan_for_c(prompts: Sequence[Prompt], scores: list[float]) -> list[float]:
    pairs = zip(prompts, scores, strict=True)
    return [float("nan") if prompt.given == "c" else score for prompt, score in pairs]


def _raise_for_c(prompts: Sequence[Prompt], scores: list[float]) -> list[float]:
    if any(prompt.given == "c" for prompt in prompts):
        raise ValueError("no letter c, please")
    return scores


def _run_short_of_memory(prompts: Sequence[Prompt], scores: list[float]) -> list[float]:
    if len({prompt.key for prompt in prompts}) > 2:
        raise torch.OutOfMemoryError("no memory")
    return scores


@pytest.mark.parametrize(
    ("meet", "message"),
    [(_nan_for_c, "the reward returned nan"), (_raise_for_c, "no letter c, please")],
)
def test_a_prompt_that_fails_becomes_an_error_record_and_the_rest_go_on(
    job: Job, whole: Job, trouble: Callable, meet: Trouble, message: str
) -> None:
    trouble(meet)
    assert job.run() == 1
    records = job.records()
    assert [index for index, record in sorted(records.items()) if "error" in record] == [1, 5]
    for index in (1, 5):
        assert records[index]["prompt"] == "c" and records[index]["id"] == f"p{index}"
        assert records[index]["error"]["type"] == "RewardError"
        assert records[index]["error"]["step"] == 0
        assert message in records[index]["error"]["message"]
    expected = whole.responses()
    for index in (0, 2, 3, 4):
        assert records[index]["token_ids"] == expected[index]
    assert "4 of 6 prompts have a response" in job.said
    assert "2 failed (index 1, 5); the same command with --retry-errors" in job.said

    # Without retry_errors nothing is decoded again; with it, only the prompts that failed are.
    before = job.output.read_bytes()
    trouble(None)
    assert job.run() == 1
    assert job.output.read_bytes() == before
    assert job.run(retry_errors=True) == 0
    assert job.responses() == expected
    assert "resuming: 4 of 6" in job.said


def test_short_memory_makes_smaller_groups(job: Job, whole: Job, trouble: Callable) -> None:
    trouble(_run_short_of_memory)
    assert job.run(batch_size=6) == 0
    assert job.responses() == whole.responses()
    assert "out of memory with 6 prompts and 24 roll-outs" in job.said
    assert "going on with 3 prompts" in job.said and "going on with 2 prompts" in job.said


def test_what_nobody_foresaw_keeps_its_traceback(
    job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ModelChoice.load

    def load_with_bug(models: ModelChoice, config: DecodeConfig) -> Any:
        method = load(models, config)
        reward = method.session.rewards["reward"]
        open_reward = reward.open

        def open_with_bug(opening: Opening) -> Any:
            if any(prompt.given == "d e f" for prompt in opening.prompts):
                raise KeyError("a bug")
            return open_reward(opening)

        reward.open = open_with_bug
        return method

    monkeypatch.setattr(ModelChoice, "load", load_with_bug)
    assert job.run() == 1
    error = job.records()[3]["error"]
    assert error["type"] == "KeyError"
    assert "open_with_bug" in error["traceback"]
    assert "open_with_bug" in job.said and "prompt 3 failed: 'a bug'" in job.said
    assert len(job.records()) == 6


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.AcceleratorError])
def test_an_interrupt_and_a_lost_device_end_the_job_and_no_finished_record_is_lost(
    job: Job, whole: Job, trouble: Callable, kind: type[BaseException]
) -> None:
    def stop(prompts: Sequence[Prompt], scores: list[float]) -> list[float]:
        if any(prompt.given == "d e f" for prompt in prompts):
            raise kind("lost")
        return scores

    trouble(stop)
    if kind is KeyboardInterrupt:
        assert job.run(batch_size=2) == 130
        assert "stopped: 2 of 6 prompts are done" in job.said
        assert "the same command goes on from there" in job.said
    else:
        with pytest.raises(RewardError, match="lost"):
            job.run(batch_size=2)
    expected = whole.responses()
    assert job.responses() == {index: expected[index] for index in (0, 1)}
    trouble(None)
    assert job.run() == 0
    assert job.responses() == expected


def test_chat_messages_token_ids_and_wrong_prompts_side_by_side(job: Job) -> None:
    chat = [{"role": "user", "content": "a b"}]
    entries = [
        {"messages": chat},
        {"token_ids": [5, 6]},
        {"token_ids": [5, 99]},
        {"prompt": ""},
        {"prompt": "a " * MAX_POSITIONS},
        {"messages": [{"content": "a"}]},
        {"prompt": "a b"},
    ]
    job.prompts.write_text("\n".join(map(json.dumps, entries)))
    assert job.run() == 1
    records = job.records()
    failed = {index: record["error"] for index, record in records.items() if "error" in record}
    assert set(failed) == {2, 3, 4, 5}
    assert all(error["type"] == "InvalidArgument" for error in failed.values())
    assert "prompts[2] has token id 99" in failed[2]["message"]
    assert "prompts[3] is empty" in failed[3]["message"]
    assert f"allows {MAX_POSITIONS}" in failed[4]["message"]
    assert "prompts[5] must be text, chat messages" in failed[5]["message"]
    assert records[0]["prompt"] == chat
    # Both prompts have the same ids; the second one has the next random stream.
    assert records[1]["prompt"] == [5, 6] and records[6]["prompt"] == "a b"
    assert records[0]["token_ids"] != records[6]["token_ids"]


def test_an_output_that_cannot_be_written_ends_the_job(
    job: Job, whole: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordFile.append

    def run_out(file: RecordFile, record: dict[str, Any]) -> None:
        if record["index"] >= 2:
            raise OutputRefused("no space left")
        append(file, record)

    monkeypatch.setattr(RecordFile, "append", run_out)
    with pytest.raises(OutputRefused, match="no space left"):
        job.run(batch_size=2)
    assert set(job.records()) == {0, 1}
    monkeypatch.undo()
    assert job.run() == 0
    assert job.responses() == whole.responses()
