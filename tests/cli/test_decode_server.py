"""`tq-fast decode` with models behind URLs: records, resuming, a server that goes away, keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.decode_job import CONFIG, Job
from tests.cli.trio import Trio
from tests.servers.fake_server import FakeServer
from tq_fast.cli import app
from tq_fast.errors import ServerUnavailable
from tq_fast.jobs.record_file import RecordFile

GREEDY = dataclasses.replace(CONFIG, rollout="greedy", strategy="greedy")
KEY = "a-secret-that-nobody-may-read"
# Waits that a test can wait for.
PATIENCE = {"backoff": 0.001, "retries": 3}

Serve = Callable[..., FakeServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start fake servers of a folder's model, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, **settings: Any) -> FakeServer:
            is_reward = "reward" in folder.name
            kind = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
            model = kind.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            fake = FakeServer(model, tokenizer, root=str(folder), **settings)
            stack.callback(fake.close)
            return fake

        yield start


@pytest.fixture
def local(tmp_path: Path, trio: Trio) -> Job:
    """The job with models of this process, done."""
    (tmp_path / "local").mkdir()
    job = Job(tmp_path / "local", trio)
    assert job.run(GREEDY, traces=True) == 0
    return job


def run(job: Job, **roles: FakeServer) -> int:
    """Run `job` with the models of `roles` behind URLs."""
    urls = {role: fake.url for role, fake in roles.items()}
    kwargs = {"model_kwargs": {role: dict(PATIENCE) for role in roles}}
    return job.run(GREEDY, traces=True, batch_size=2, models={**urls, **kwargs})


def test_records_of_served_models_are_those_of_local_ones(
    job: Job, local: Job, trio: Trio, serve: Serve
) -> None:
    fakes = {role: serve(getattr(trio, role)) for role in ("baseline", "sft", "reward")}
    assert run(job, **fakes) == 0
    ours, truth = job.records(), local.records()
    assert ours.keys() == truth.keys()
    for index, record in ours.items():
        other = truth[index]
        # The settings name other models, and sums run in other orders.
        for name in other.keys() - {"settings", "certificate", "trace"}:
            assert record[name] == other[name]
        # With the SFT model as the prior, it takes whole laws, which servers do not give.
        assert record["certificate"]["gap_reduction"] is None
        for name, value in other["certificate"].items():
            if name == "gap_reduction":
                continue
            near = pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
            assert record["certificate"][name] == near, name
        for step, expected in zip(record["trace"], other["trace"], strict=True):
            for name in ("candidates", "q", "prior_logprobs"):
                assert step[name] == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize("role", ["baseline", "reward"])
def test_a_server_that_goes_away_ends_the_job_which_goes_on_at_another_url(
    job: Job, trio: Trio, serve: Serve, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    folder = getattr(trio, role)
    undisturbed = Job(_folder(job), trio)
    assert run(undisturbed, **{role: serve(folder)}) == 0

    first = serve(folder)
    with monkeypatch.context() as patch:
        _fail_after_the_second_response(patch, first)
        with pytest.raises(ServerUnavailable) as caught:
            run(job, **{role: first})
    message = str(caught.value)
    assert "was tried 4 times" in message and first.url.removesuffix("/v1") in message
    assert f"2 of 6 prompts are done in {job.output}; the same command goes on" in message
    records = job.records()
    assert len(records) == 2 and not any("error" in record for record in records.values())

    # Of another address, the server is the same model.
    second = serve(folder)
    assert second.url != first.url
    assert run(job, **{role: second}) == 0
    assert "resuming: 2 of 6 prompts are done" in job.said
    assert job.records() == undisturbed.records()
    # How patient the client is may change, too.
    assert job.run(GREEDY, traces=True, models={role: second.url}) == 0


def _folder(job: Job) -> Path:
    folder = job.output.parent / "undisturbed"
    folder.mkdir()
    return folder


def _fail_after_the_second_response(patch: pytest.MonkeyPatch, fake: FakeServer) -> None:
    append, num_written = RecordFile.append, [0]

    def append_and_fail(file: RecordFile, record: dict[str, Any]) -> None:
        append(file, record)
        num_written[0] += 1
        if num_written[0] == 2:
            fake.failures.extend([503] * 1000)

    patch.setattr(RecordFile, "append", append_and_fail)


def command(job: Job, **options: Any) -> list[str]:
    """`tq-fast decode` as a user writes it."""
    words = ["tq-fast", "decode", "--prompts", str(job.prompts), "--output", str(job.output)]
    words += ["--max-new-tokens", "3", "--k", "4", "--horizon", "2", "--rollout", "greedy"]
    words += ["--strategy", "greedy"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return words


def main(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        app.main()
    return int(end.value.code or 0)


def test_the_command_takes_a_url_and_fields_of_the_server(
    job: Job, trio: Trio, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(trio.baseline, names=("one", "other"))
    options = {"baseline": fake.url, "reward": trio.reward}
    assert main(command(job, **options), monkeypatch) == 2
    fields = 'baseline={"model": "other"}'
    assert main(command(job, **options, model_kwargs=fields), monkeypatch) == 0
    assert len(job.records()) == 6
    assert {body["model"] for path, body in fake.requests if "completions" in path} == {"other"}


def test_a_server_that_stays_away_has_an_exit_code_and_one_line(
    job: Job,
    trio: Trio,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = serve(trio.baseline)
    options = {"baseline": fake.url, "reward": trio.reward}
    options["model_kwargs"] = f"baseline={json.dumps(PATIENCE)}"
    with monkeypatch.context() as patch:
        _fail_after_the_second_response(patch, fake)
        assert main(command(job, **options, batch_size=1), monkeypatch) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("tq-fast: error: POST http://127.0.0.1")
    assert not any("error" in record for record in job.records().values())
    # Nobody answers before any work, either.
    assert main(command(job, **options), monkeypatch) == 3


def test_a_key_is_in_no_record_no_file_and_no_message(
    job: Job,
    trio: Trio,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = serve(trio.baseline, key=KEY)
    options = {"baseline": fake.url, "reward": trio.reward}
    assert main(command(job, **options), monkeypatch) == 2
    assert "put it into the environment variable VLLM_API_KEY" in capsys.readouterr().err

    named = f"baseline={json.dumps({**PATIENCE, 'api_key_env': 'THE_KEY'})}"
    monkeypatch.setenv("THE_KEY", KEY)
    assert main(command(job, **options, model_kwargs=named), monkeypatch) == 0
    # The key in the place of its variable's name is refused.
    wrong = f"baseline={json.dumps({'api_key_env': KEY})}"
    assert main(command(job, **options, model_kwargs=wrong), monkeypatch) == 2
    fake.failures.extend([(500, {}, f"{KEY} is no key of mine")] * 1000)
    again = [*command(job, **options, model_kwargs=named), "--overwrite"]
    assert main(again, monkeypatch) == 3

    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    files = [path for path in job.output.parent.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
