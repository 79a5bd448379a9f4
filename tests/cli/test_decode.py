"""`tq-fast decode`: records, stopped and resumed, refused where it must be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tq_fast
from tests.cli.decode_job import CONFIG, TEXTS, Job
from tests.cli.trio import Trio
from tq_fast import DecodeConfig
from tq_fast.errors import BackendRefused, InvalidArgument
from tq_fast.jobs.record_file import OutputRefused


def test_a_record_holds_everything_about_its_prompt(whole: Job) -> None:
    settings = json.loads((whole.output.parent / "out.jsonl.settings.json").read_text())
    for index, record in whole.records().items():
        assert set(record) == {
            *("index", "id", "prompt", "response", "token_ids", "steps"),
            *("certificate", "trace", "settings", "tq_fast"),
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
        assert record["tq_fast"] == settings["tq_fast"] == tq_fast.__version__
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
    # The settings of the output are still those that its records were made with.
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
        (["g", *TEXTS], "number of prompts was 6, is 7; the prompt with index 0 is another"),
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


@pytest.fixture
def older(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose first two records another version made."""
    with monkeypatch.context() as earlier:
        for module in ("cli.job", "jobs.resume"):
            earlier.setattr(f"tq_fast.{module}.read_version", lambda: "0.1.0")
        job.write_prompts(TEXTS[:2])
        assert job.run() == 0
    job.write_prompts(TEXTS)
    return job


def test_records_of_another_version_are_added_to_only_where_the_user_says_so(older: Job) -> None:
    before = older.output.read_bytes()
    refusal = "was made by tq-fast 0.1.0, this is .* --mix-versions goes on"
    with pytest.raises(OutputRefused, match=refusal):
        older.run()
    assert older.output.read_bytes() == before
    assert older.run(mix_versions=True) == 0
    versions = [record["tq_fast"] for _, record in sorted(older.records().items())]
    assert versions == ["0.1.0"] * 2 + [tq_fast.__version__] * 4


def test_the_version_is_known_without_the_settings_file_and_from_it_alone(older: Job) -> None:
    settings = older.output.with_name("out.jsonl.settings.json")
    kept = settings.read_text()
    settings.unlink()
    with pytest.raises(OutputRefused, match=r"was made by tq-fast 0\.1\.0"):
        older.run()
    records = [json.loads(line) for line in older.output.read_text().splitlines()]
    for record in records:
        del record["tq_fast"]
    older.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(OutputRefused, match="was made by tq-fast unknown"):
        older.run()
    settings.write_text(kept)
    with pytest.raises(OutputRefused, match=r"was made by tq-fast 0\.1\.0"):
        older.run()


def test_a_finished_job_of_another_version_is_left_as_it_is(older: Job) -> None:
    older.write_prompts(TEXTS[:2])
    before = older.output.read_bytes()
    assert older.run() == 0 and "nothing was left to do" in older.said
    assert older.output.read_bytes() == before


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


def test_many_rollouts_that_are_too_noisy_are_said_once(job: Job) -> None:
    noisy = dataclasses.replace(CONFIG, alpha=0.01, num_rollouts=3)
    assert job.run(noisy, batch_size=2) == 0
    assert job.said.count("the standard error of Q exceeds alpha=0.01") == 1
    assert "of 36 steps" in job.said


def test_prompts_may_be_appended_and_the_job_goes_on(job: Job) -> None:
    appended = [*TEXTS, "g", "a b"]
    job.write_prompts(appended)
    assert job.run() == 0
    expected = job.responses()
    job.output.unlink()
    job.write_prompts(TEXTS)
    assert job.run() == 0
    before = job.output.read_text()
    job.write_prompts(appended)
    assert job.run() == 0
    assert "resuming: 6 of 8 prompts are done" in job.said
    assert job.output.read_text().startswith(before)
    assert job.responses() == expected
    # The appended prompt belongs to the job from now on.
    job.write_prompts(TEXTS)
    with pytest.raises(OutputRefused, match="number of prompts was 8, is 6"):
        job.run()


def test_other_keys_of_the_file_come_back(job: Job) -> None:
    row = {"prompt": "a", "gold": 4, "tags": [None, 0.123456789], "response": "theirs", "id": "x"}
    chat = {"messages": [{"role": "user", "content": "a"}], "prompt": "b", "steps": 1}
    job.prompts.write_text(json.dumps(row) + "\n" + json.dumps(chat) + "\n")
    assert job.run() == 0
    first, second = job.records()[0], job.records()[1]
    assert first["gold"] == 4 and first["tags"] == [None, 0.123456789]
    assert first["extra"] == {"response": "theirs"} and first["response"] != "theirs"
    assert second["messages"] == chat["messages"] and second["extra"] == {"steps": 1}
    assert second["prompt"] == "b"


def test_an_error_record_holds_other_keys_too(job: Job) -> None:
    job.prompts.write_text('{"prompt": "", "gold": 4, "error": "theirs"}\n')
    assert job.run() == 1
    (record,) = job.records().values()
    assert record["gold"] == 4 and record["extra"] == {"error": "theirs"}
    assert record["error"]["type"] == "InvalidArgument"


def test_several_responses_make_one_record(job: Job, whole: Job) -> None:
    config = dataclasses.replace(CONFIG, num_return_sequences=3)
    assert job.run(config, batch_size=2) == 0
    assert job.responses() == whole.responses()
    for record in job.records().values():
        assert len(record["other_responses"]) == 2
        for other in record["other_responses"]:
            assert set(other) == {"response", "token_ids", "steps", "certificate"}
    assert "6 of 6 prompts have a response" in job.said
    assert job.run(config) == 0 and "nothing was left to do" in job.said


REFUSES = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}a"


def test_a_chat_that_the_template_refuses_is_an_error_record(job: Job) -> None:
    chat = [{"role": "user", "content": "a"}]
    rows = [{"prompt": chat}, {"prompt": chat * 2}]
    job.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"template_options": {"chat_template": REFUSES}}
    assert job.run(**options) == 1
    assert "response" in job.records()[0]
    error = job.records()[1]["error"]
    assert error["type"] == "InvalidArgument"
    assert "prompts[1]: the chat template" in error["message"]
    with pytest.raises(OutputRefused, match=r"template_options was .*, is not given"):
        job.run()
