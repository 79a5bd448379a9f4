"""`tq-fast decode`: stopped and resumed, wrong in part, refused where it must be."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.commands.trio import MAX_POSITIONS, Trio
from tq_fast import DecodeConfig
from tq_fast.commands.decode import JobOptions, run_decode
from tq_fast.commands.job_settings import ModelChoice
from tq_fast.commands.record_file import OutputRefused, RecordFile
from tq_fast.errors import BackendRefused, InvalidArgument, RewardError
from tq_fast.models.reward import Opening, RewardSession, drop_from
from tq_fast.prompts import Prompt

CONFIG = DecodeConfig(k=4, horizon=3, max_new_tokens=6, eos_token_id=())
# Equal prompts, so that random streams must be numbered over the whole file.
TEXTS = ["a b", "c", "a b", "d e f", "a b", "c"]


class Job:
    """One command line, run as often as wanted; what it said is in `said`."""

    def __init__(self, folder: Path, trio: Trio, texts: Sequence[str] = TEXTS) -> None:
        self.prompts = folder / "prompts.jsonl"
        self.output = folder / "out.jsonl"
        self.models = ModelChoice(
            baseline=str(trio.baseline), sft=str(trio.sft), reward=str(trio.reward)
        )
        self.said = ""
        self.write_prompts(texts)

    def write_prompts(self, texts: Sequence[str]) -> None:
        lines = [json.dumps({"prompt": text, "id": f"p{i}"}) for i, text in enumerate(texts)]
        self.prompts.write_text("\n".join(lines) + "\n")

    def run(self, config: DecodeConfig = CONFIG, **options: Any) -> int:
        heard = io.StringIO()
        models = dataclasses.replace(self.models, **options.pop("models", {}))
        console = Console(file=heard, width=80)
        try:
            return run_decode(
                config, models, str(self.prompts), self.output, JobOptions(**options), console
            )
        finally:
            self.said = heard.getvalue()

    def records(self) -> dict[int, dict[str, Any]]:
        lines = self.output.read_bytes().split(b"\n")
        assert lines.pop() == b""
        records = [json.loads(line) for line in lines]
        by_index = {record["index"]: record for record in records}
        assert len(by_index) == len(records), "a prompt has two records"
        return by_index

    def responses(self) -> dict[int, list[int]]:
        return {index: record["token_ids"] for index, record in sorted(self.records().items())}


@pytest.fixture
def job(tmp_path: Path, trio: Trio) -> Job:
    return Job(tmp_path, trio)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trio: Trio) -> Job:
    """A job that nothing disturbed."""
    job = Job(tmp_path_factory.mktemp("whole"), trio)
    assert job.run(traces=True) == 0
    return job


def test_a_record_holds_everything_about_its_prompt(whole: Job) -> None:
    settings = json.loads((whole.output.parent / "out.jsonl.settings.json").read_text())
    for index, record in whole.records().items():
        assert set(record) == {
            *("index", "id", "prompt", "response", "token_ids", "steps"),
            *("certificate", "trace", "settings"),
        }
        assert record["id"] == f"p{index}" and record["prompt"] == TEXTS[index]
        assert record["steps"] == len(record["token_ids"]) == len(record["trace"]) == 6
        chosen = [step["candidates"][step["choice"]] for step in record["trace"]]
        assert chosen == record["token_ids"]
        assert record["certificate"]["prior"] == "sft"
        total = sum(step["kl_to_sft"] for step in record["trace"])
        assert record["certificate"]["kl_to_sft"] == pytest.approx(total, rel=1e-5)
        # A standard error cannot be estimated from one roll-out.
        assert record["trace"][0]["q_stderr"] == [None] * 4
        assert record["settings"] == settings["fingerprint"]
    assert settings["settings"]["alpha"] == CONFIG.alpha
    assert "6 of 6 prompts have a response" in whole.said


def test_equal_prompts_have_responses_of_their_own(whole: Job) -> None:
    responses = whole.responses()
    assert len({tuple(responses[index]) for index in (0, 2, 4)}) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_do_not_depend_on_the_batch_size(job: Job, whole: Job, batch_size: int) -> None:
    assert job.run(batch_size=batch_size) == 0
    assert job.responses() == whole.responses()


@pytest.mark.parametrize("kept", [(), (4,), (0, 1, 3), (1, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_a_resumed_job_ends_as_an_uninterrupted_one(
    job: Job, whole: Job, kept: tuple[int, ...]
) -> None:
    assert job.run() == 0
    lines = job.output.read_text().splitlines(keepends=True)
    left = [line for line in lines if json.loads(line)["index"] in kept]
    job.output.write_text("".join(left))
    assert job.run(batch_size=2) == 0
    assert job.responses() == whole.responses()
    assert job.output.read_text().startswith("".join(left)), "a finished record was touched"
    if 0 < len(kept) < 6:
        assert f"resuming: {len(kept)} of 6 prompts are done" in job.said
    assert ("nothing was left to do" in job.said) == (len(kept) == 6)


def test_broken_lines_are_reported_and_decoded_again(job: Job, whole: Job) -> None:
    assert job.run() == 0
    lines = job.output.read_bytes().splitlines(keepends=True)
    lines[2] = b"\x00" * 40 + b"\n"
    job.output.write_bytes(b"".join(lines)[:-9])
    assert job.run() == 0
    assert job.responses() == whole.responses()
    assert "line 3 of the output is no record; its prompt is decoded again" in job.said
    assert "line 6 of the output was cut off while it was written" in job.said
    assert "resuming: 4 of 6" in job.said


def test_a_first_record_cut_in_half_is_no_foreign_file(job: Job, whole: Job) -> None:
    assert job.run() == 0
    job.output.write_bytes(job.output.read_bytes()[:20])
    assert job.run() == 0
    assert job.responses() == whole.responses()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": dataclasses.replace(CONFIG, alpha=0.5)}, "alpha was 1.0, is 0.5"),
        ({"config": dataclasses.replace(CONFIG, seed=1, k=3)}, "k was 4, is 3; seed was 0, is 1"),
        ({"traces": True}, "traces was False, is True"),
        ({"models": {"dtype": "bfloat16"}}, "dtype was 'auto', is 'bfloat16'"),
        (
            {"models": {"reward_bounds": (-9.0, 9.0)}},
            r"reward_bounds was not given, is \[-9.0, 9.0\]",
        ),
        ({"models": {"sft": None}}, "sft was '.*/sft', is not given"),
    ],
)
def test_other_settings_are_refused_and_named(
    job: Job, change: dict[str, Any], message: str
) -> None:
    assert job.run() == 0
    before = job.output.read_bytes()
    with pytest.raises(OutputRefused, match=message):
        job.run(**change)
    assert job.output.read_bytes() == before
    # What was refused did not become the settings of the output.
    assert job.run() == 0
    assert job.run(**change, overwrite=True) == 0
    assert job.output.read_bytes() != before


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    job: Job, trio: Trio, tmp_path: Path
) -> None:
    assert job.run() == 0
    with pytest.raises(OutputRefused, match=r"reward was '.*/reward', is '.*/other_reward'"):
        job.run(models={"reward": str(trio.other_reward)})
    copy = tmp_path / "copy"
    shutil.copytree(trio.reward, copy)
    assert job.run(models={"reward": str(copy)}) == 0


def test_a_model_that_was_trained_on_is_refused(job: Job, trio: Trio, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(trio.reward, folder)
    assert job.run(models={"reward": str(folder)}) == 0
    shutil.copy(trio.other_reward / "model.safetensors", folder)
    with pytest.raises(OutputRefused, match=r"reward '.*/reward' has changed since"):
        job.run(models={"reward": str(folder)})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([*TEXTS, "g"], "number of prompts was 6, is 7"),
        (TEXTS[:4], "number of prompts was 6, is 4"),
        ([*TEXTS[:3], "g", *TEXTS[4:]], "the prompt with index 3 is another"),
        (list(reversed(TEXTS)), "the prompt with index 0 is another"),
    ],
)
def test_other_prompts_are_refused_and_named(job: Job, texts: list[str], message: str) -> None:
    assert job.run() == 0
    before = job.output.read_bytes()
    job.write_prompts(texts)
    with pytest.raises(OutputRefused, match=message):
        job.run()
    assert job.output.read_bytes() == before


def test_without_its_settings_file_an_output_is_resumed_by_the_same_settings_only(
    job: Job, whole: Job
) -> None:
    assert job.run() == 0
    settings = job.output.with_name("out.jsonl.settings.json")
    settings.unlink()
    with pytest.raises(OutputRefused, match=r"records name settings \w+, these are .* not there"):
        job.run(dataclasses.replace(CONFIG, alpha=0.5))
    assert job.run() == 0
    assert job.responses() == whole.responses()
    assert settings.exists()


def test_a_foreign_file_is_never_touched(job: Job) -> None:
    job.output.write_text("notes\n")
    with pytest.raises(OutputRefused, match="holds no record of this command"):
        job.run()
    assert job.output.read_text() == "notes\n"
    assert [path.name for path in job.output.parent.glob("out*")] == ["out.jsonl"]
    assert job.run(overwrite=True) == 0
    job.output = job.prompts
    with pytest.raises(OutputRefused, match="is the file of the prompts"):
        job.run(overwrite=True)


@pytest.mark.parametrize(
    ("config", "models", "message"),
    [
        (dataclasses.replace(CONFIG, k=1000), {}, "k must be at most the vocabulary"),
        (dataclasses.replace(CONFIG, prior="sft"), {"sft": None}, "prior='sft' needs an sft"),
        (CONFIG, {"reward": "./nothing"}, "reward='./nothing': there is no such folder"),
        (CONFIG, {"dtype": "float31"}, "dtype must be one of auto, .* got 'float31'"),
        (CONFIG, {"device": "gpuu"}, "device 'gpuu' cannot be used"),
        (dataclasses.replace(CONFIG, backend="cuda"), {"device": "cpu"}, "'cuda' refused"),
    ],
)
def test_what_is_wrong_for_every_prompt_ends_the_job_and_leaves_nothing(
    job: Job, config: DecodeConfig, models: dict[str, Any], message: str
) -> None:
    with pytest.raises((InvalidArgument, BackendRefused), match=message):
        job.run(config, models=models)
    assert not list(job.output.parent.glob("out*"))


def test_with_overwrite_an_output_stays_until_the_models_are_loaded(job: Job) -> None:
    assert job.run() == 0
    before = job.output.read_bytes()
    with pytest.raises(InvalidArgument, match="no such folder"):
        job.run(models={"reward": "./nothing"}, overwrite=True)
    assert job.output.read_bytes() == before


# A reward of the trio that meets some prompts with something else than a score.
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
        def load_with_trouble(models: ModelChoice) -> Any:
            decoder = load(models)
            if meet is not None:
                open_reward = decoder.reward.open

                def open_with_trouble(opening: Opening) -> Any:
                    return _TroubledSession(open_reward(opening), opening.prompts, meet)

                decoder.reward.open = open_with_trouble
            return decoder

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

    # Resumed as it is, nothing is decoded again; with retry_errors, what failed is, and alone.
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

    def load_with_bug(models: ModelChoice) -> Any:
        decoder = load(models)
        open_reward = decoder.reward.open

        def open_with_bug(opening: Opening) -> Any:
            if any(prompt.given == "d e f" for prompt in opening.prompts):
                raise KeyError("a bug")
            return open_reward(opening)

        decoder.reward.open = open_with_bug
        return decoder

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
    # The same ids, the second time: the next random stream, whatever stands between them.
    assert records[1]["prompt"] == [5, 6] and records[6]["prompt"] == "a b"
    assert records[0]["token_ids"] != records[6]["token_ids"]


def test_many_rollouts_that_are_too_noisy_are_said_once(job: Job) -> None:
    noisy = dataclasses.replace(CONFIG, alpha=0.01, num_rollouts=3)
    assert job.run(noisy, batch_size=2) == 0
    assert job.said.count("the standard error of Q exceeded alpha=0.01") == 1
    assert "of 36 steps" in job.said


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
