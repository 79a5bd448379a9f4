"""The command line as a user meets it: help, errors, and jobs that are killed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tq_fast
from tests.cli.trio import Trio, save_trio
from tq_fast.cli import app as cli
from tq_fast.cli import decode as decode_command
from tq_fast.cli import demo as demo_command
from tq_fast.cli.demo import DemoOptions
from tq_fast.config import DecodeConfig
from tq_fast.jobs.record_file import OutputRefused, RecordFile
from tq_fast.jobs.resume import ModelChoice

FIELDS = {field.name: field for field in dataclasses.fields(DecodeConfig)}
NEEDED = ["decode", "--baseline", "b", "--reward", "r", "--prompts", "p", "--output", "o"]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that the command was called with, instead of running it."""
    seen: dict[str, Any] = {}

    def note(config, models, prompts, output, options, console) -> int:
        seen.update(config=config, models=models, prompts=prompts, output=output, options=options)
        return 0

    monkeypatch.setattr(decode_command, "run_decode", note)
    return seen


def test_every_field_of_the_configuration_is_an_option_with_its_default(seen: dict) -> None:
    assert invoke(*NEEDED).exit_code == 0
    assert seen["config"] == DecodeConfig()
    shown = invoke("decode", "--help").output
    for name in FIELDS:
        assert f"--{name.replace('_', '-')} " in shown


# Each field has a value here that is not its default, as a word of the command line.
OTHER_VALUES: dict[str, Any] = {
    "k": 3,
    "alpha": 0.25,
    "beta": 0.1,
    "num_rollouts": 5,
    "horizon": 0,
    "max_new_tokens": 7,
    "min_new_tokens": 2,
    "stop": ("END",),
    "strategy": "greedy",
    "rollout": "greedy",
    "rollout_temperature": 0.7,
    "rollout_top_k": 40,
    "rollout_top_p": 0.9,
    "prior": "baseline",
    "candidates_from": "sft",
    "transfer": "indirect",
    "weights": "reward_gap",
    "estimator": "soft",
    "eos_token_id": (4,),
    "num_return_sequences": 2,
    "skip_special_tokens": False,
    "seed": -3,
    "backend": "ref",
}


def test_the_table_of_values_knows_every_field() -> None:
    assert set(OTHER_VALUES) == set(FIELDS)
    assert not [name for name, value in OTHER_VALUES.items() if value == FIELDS[name].default]


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_reaches_its_field(seen: dict, name: str) -> None:
    value = OTHER_VALUES[name]
    word = str(value[0] if isinstance(value, tuple) else value)
    more = {"transfer": {"beta": 1.0}}.get(name, {})
    words = [part for key, other in more.items() for part in (f"--{key}", str(other))]
    option = name.replace("_", "-")
    given = [f"--no-{option}"] if value is False else [f"--{option}", word]
    result = invoke(*NEEDED, *given, *words)
    assert result.exit_code == 0, result.output
    assert seen["config"] == DecodeConfig(**{name: value}, **more)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--horizon", "none"], {"horizon": None}),
        (["--eos-token-id", "never"], {"eos_token_id": ()}),
        (["--stop", "a b", "--stop", "c"], {"stop": ("a b", "c")}),
        (["--eos-token-id", "4", "--eos-token-id", "9"], {"eos_token_id": (4, 9)}),
    ],
)
def test_words_for_what_is_no_number(seen: dict, words: list[str], expected: dict) -> None:
    assert invoke(*NEEDED, *words).exit_code == 0
    assert seen["config"] == DecodeConfig(**expected)


def test_the_other_options_reach_the_job(seen: dict) -> None:
    words = "--sft s --baseline-reward br --tokenizer t --reward-tokenizer rt"
    words += " --baseline-reward-tokenizer brt --reward-index 1 --reward-bounds -1 2.5"
    words += " --reward-pair --reward-truncate left --reward-keep-special-tokens"
    words += " --device cpu --dtype bfloat16 --batch-size 3 --traces"
    words += " --overwrite --retry-errors --mix-versions --memory-budget 1000"
    kwargs = ['sft={"revision":"v2"}', 'baseline={"trust_remote_code":true}']
    words += "".join(f" --model-kwargs {word}" for word in kwargs)
    template = ["--template-options", '{"enable_thinking": false}']
    assert invoke(*NEEDED, *words.split(), *template).exit_code == 0
    assert dataclasses.asdict(seen["models"]) == {
        "baseline": "b",
        "reward": "r",
        "sft": "s",
        "baseline_reward": "br",
        "tokenizer": "t",
        "reward_tokenizer": "rt",
        "baseline_reward_tokenizer": "brt",
        "reward_index": 1,
        "reward_bounds": (-1.0, 2.5),
        "reward_options": {"pair": True, "truncate": "left", "keep_special_tokens": True},
        "device": "cpu",
        "dtype": "bfloat16",
        "model_kwargs": {"sft": {"revision": "v2"}, "baseline": {"trust_remote_code": True}},
        "method": None,
        "own": {},
    }
    assert seen["prompts"] == "p" and seen["output"] == Path("o")
    assert dataclasses.asdict(seen["options"]) == {
        "batch_size": 3,
        "memory_budget": 1000,
        "traces": True,
        "overwrite": True,
        "retry_errors": True,
        "mix_versions": True,
        "template_options": {"enable_thinking": False},
        "cluster": None,
    }


@pytest.mark.parametrize(("word", "reason"), [("{1}", "is not JSON"), ("[1]", "a JSON object")])
def test_template_options_must_be_a_json_object(seen: dict, word: str, reason: str) -> None:
    result = invoke(*NEEDED, "--template-options", word)
    assert result.exit_code == 2 and reason in result.output and not seen


def test_a_device_may_be_given_by_role(seen: dict) -> None:
    words = "--device baseline=cpu --device reward=meta"
    assert invoke(*NEEDED, *words.split()).exit_code == 0
    assert seen["models"].device == {"baseline": "cpu", "reward": "meta"}


@pytest.mark.parametrize(
    "words", ["--device cpu --device meta", "--device sft=cpu --device sft=cpu", "--device sft="]
)
def test_devices_that_contradict_are_refused(seen: dict, words: str) -> None:
    result = invoke(*NEEDED, *words.split())
    assert result.exit_code == 2 and "--device" in result.output and not seen


@pytest.mark.parametrize("word", ["baseline", "baseline={", "baseline=[1]"])
def test_model_kwargs_that_are_no_json_object_are_refused(seen: dict, word: str) -> None:
    result = invoke(*NEEDED, "--model-kwargs", word)
    assert result.exit_code == 2 and "--model-kwargs" in result.output


def test_every_argument_of_the_decoder_can_be_given() -> None:
    # Speed options are switched off for measuring, which code does.
    arguments = set(inspect.signature(tq_fast.TransferDecoder).parameters) - {"speed"}
    fields = {field.name for field in dataclasses.fields(ModelChoice)}
    assert arguments == fields - {"method", "own"}


def test_the_options_of_the_demo_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(demo_command, "run_demo", lambda options, console: seen.append(options))
    words = "--prompts 2 --seed 5 --k 4 --alpha 0.2 --num-rollouts 3"
    assert invoke("demo", *words.split()).exit_code == 0
    assert invoke("demo").exit_code == 0
    given = DemoOptions(seed=5, num_prompts=2, k=4, alpha=0.2, num_rollouts=3)
    assert seen == [given, DemoOptions()]


def test_info_prints_to_standard_output() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    assert "Backend of each op" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # The two words are looked for one by one: versions of typer put different words between.
        ([*NEEDED, "--alhpa", "2"], "No such option"),
        ([*NEEDED, "--alhpa", "2"], "--alhpa"),
        ([*NEEDED, "--alhpa", "2"], "--alpha"),
        (["decod"], "decode"),
        (["decode"], "Missing option '--prompts'"),
        ([*NEEDED, "--horizon", "far"], "'far' is neither an integer nor 'none'"),
        ([*NEEDED, "--eos-token-id", "never", "--eos-token-id", "2"], "got 'never 2'"),
        ([*NEEDED, "--k", "many"], "Invalid value for '--k'"),
    ],
)
def test_usage_errors_name_what_is_wrong_and_what_is_near(words: list[str], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.output


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tq-fast", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_an_error_of_the_package_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *NEEDED, "--strategy", "gready") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "tq-fast: error: strategy must be one of 'sample', 'greedy', got 'gready'\n"
    )


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(decode_command, "run_decode", fail)
    monkeypatch.setattr(sys, "argv", ["tq-fast", *NEEDED])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_the_package_itself_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m tq_fast", *NEEDED, "--strategy", "gready"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("tq_fast", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("tq-fast: error: strategy must be one of")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"tq-fast {tq_fast.__version__}\n"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return save_trio(tmp_path_factory.mktemp("models"))


class Command:
    """`tq-fast decode` on prompts from standard input, with work for a few seconds."""

    def __init__(self, folder: Path, trio: Trio) -> None:
        self.output = folder / "out.jsonl"
        words = ["--baseline", trio.baseline, "--sft", trio.sft, "--reward", trio.reward]
        words += ["--k", 8, "--num-rollouts", 6, "--horizon", 8, "--max-new-tokens", 16]
        words += ["--eos-token-id", "never", "--batch-size", 2, "--prompts", "-"]
        self.words = ["decode", *(str(word) for word in words)]
        self.text = "\n".join("a b c" if idx % 3 else f"d {'e ' * idx}" for idx in range(12))

    def start(self) -> subprocess.Popen[str]:
        """Run it in a process of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tq_fast", *self.words, "--output", str(self.output)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(tq_fast.__file__).parent.parent,
            # Tests that run in the background are started with interrupts ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        process.stdin.write(self.text)
        process.stdin.close()
        return process

    def wait_for_records(self, process: subprocess.Popen[str], number: int) -> None:
        """Return as soon as the output holds `number` records."""
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < number:
            if process.poll() is not None:
                pytest.fail(f"ended before it had {number} records: {process.stdout.read()}")
            time.sleep(0.02)

    def finish(self, output: Path) -> Result:
        """Run it to the end in this process."""
        words = [*self.words, "--output", str(output)]
        return CliRunner().invoke(cli.app, words, input=self.text)


def read_responses(path: Path) -> dict[int, list[int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    responses = {record["index"]: record["token_ids"] for record in records}
    assert len(responses) == len(records), "a prompt has two records"
    return responses


def test_a_job_that_is_interrupted_then_killed_ends_as_an_undisturbed_one(
    tmp_path: Path, trio: Trio
) -> None:
    command = Command(tmp_path, trio)
    interrupted = command.start()
    command.wait_for_records(interrupted, 2)
    with pytest.raises(OutputRefused, match="is being written by another process"):
        RecordFile(command.output).__enter__()
    interrupted.send_signal(signal.SIGINT)
    said = interrupted.stdout.read()
    assert interrupted.wait() == 130, said
    assert "the same command goes on from there" in said.splitlines()[-1]
    assert "Traceback" not in said

    num_before = len(read_responses(command.output))
    killed = command.start()
    command.wait_for_records(killed, num_before + 2)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    at_death = command.output.read_bytes()
    finished_at_death = at_death[: at_death.rindex(b"\n") + 1]

    resumed = command.finish(command.output)
    assert resumed.exit_code == 0, resumed.output
    assert "resuming" in resumed.output
    assert command.output.read_bytes().startswith(finished_at_death)
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert command.finish(undisturbed).exit_code == 0
    assert read_responses(command.output) == read_responses(undisturbed)
    assert len(read_responses(undisturbed)) == 12
