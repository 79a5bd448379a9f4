"""`tq-fast fit-value`: texts drawn or taken from records, and the head that comes of them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.cli.decode_job import CONFIG, TEXTS, Job
from tests.cli.test_app import invoke
from tests.cli.trio import Trio
from tq_fast import DecodeConfig
from tq_fast.cli import fit_value as fit_command
from tq_fast.cli.fit_value import FitJob, run_fit_value
from tq_fast.cli.job import JobOptions
from tq_fast.errors import InvalidArgument
from tq_fast.jobs.record_file import OutputRefused, RecordFile
from tq_fast.values.head import ValueHead

DRAWING = DecodeConfig(max_new_tokens=6, eos_token_id=(), alpha=0.5)
MODELS = ("baseline", "sft", "reward")


class Fit:
    """One command line, run as often as wanted; what it said is in `said`, its table in `shown`."""

    def __init__(self, folder: Path, trio: Trio) -> None:
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
        self.output = folder / "head"
        self.trio = trio
        self.said = self.shown = ""

    def run(self, config: DecodeConfig = DRAWING, **changes: Any) -> int:
        models = {name: str(getattr(self.trio, name)) for name in MODELS}
        models |= changes.pop("models", {})
        models["baseline"] = None if models["baseline"] is None else [models["baseline"]]
        options = JobOptions(**changes.pop("options", {}))
        job = FitJob(
            **{
                "prompts": str(self.prompts),
                "from_records": None,
                "output": self.output,
                "source": "sft",
                "num_texts": 3,
                "rounds": 1,
                "epochs": 2,
                **changes,
            }
        )
        heard, shown = io.StringIO(), io.StringIO()
        try:
            consoles = Console(file=heard, width=80), Console(file=shown, width=80)
            return run_fit_value(config, models, job, options, *consoles)
        finally:
            self.said, self.shown = heard.getvalue(), shown.getvalue()

    def head(self) -> dict[str, torch.Tensor]:
        return ValueHead.load(self.output).state_dict()

    def has(self, head: dict[str, torch.Tensor]) -> bool:
        return all(bool((weight == head[name]).all()) for name, weight in self.head().items())


@pytest.fixture
def fit(tmp_path: Path, trio: Trio) -> Fit:
    return Fit(tmp_path, trio)


def test_a_head_is_fitted_to_the_texts_of_a_job_and_serves_a_job(fit: Fit, job: Job) -> None:
    assert fit.run() == 0
    assert "6 of 6 prompts have a response" in fit.said
    assert "fitting to 18 texts of 6 prompts" in fit.said
    assert "epoch 2/2: held-out R2" in fit.said
    head = ValueHead.load(fit.output)
    lines = fit.shown.splitlines()
    assert lines[0].split() == ["texts", "18"] and lines[1].split() == ["tokens", "108"]
    assert lines[3].split() == ["held-out", "R2", f"{head.config.fit['r2']:.3f}"]
    rows = [line.split() for line in lines if line.count(".") == 2]
    assert [row[0] for row in rows] == [
        f"{part['predicted']:.3f}" for part in head.config.fit["calibration"]
    ]
    guided = {"method": "value_guided", "own": {"value": str(fit.output)}}
    assert job.run(dataclasses.replace(CONFIG, alpha=0.5), models=guided) == 0


def test_an_interrupted_fit_goes_on_and_ends_as_an_uninterrupted_one(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rewards are the same to the last bit only in groups of one size.
    assert fit.run(output=fit.output.with_name("whole"), options={"batch_size": 2}) == 0
    expected = ValueHead.load(fit.output.with_name("whole")).state_dict()
    append = RecordFile.append

    def stop_at_third(file: RecordFile, record: dict[str, Any]) -> None:
        if file.path.exists() and len(file.path.read_bytes().splitlines()) == 2:
            raise KeyboardInterrupt
        append(file, record)

    monkeypatch.setattr(RecordFile, "append", stop_at_third)
    assert fit.run(options={"batch_size": 2}) == 130
    monkeypatch.undo()
    assert not (fit.output / "config.json").exists() and "fitting" not in fit.said
    assert fit.run(options={"batch_size": 2}) == 0
    assert "resuming: 2 of 6" in fit.said
    assert fit.has(expected)
    # What belongs to the fit alone may change: no text is drawn again.
    changed = dataclasses.replace(DRAWING, alpha=0.25, beta=1.0)
    assert fit.run(changed, epochs=1) == 0
    assert "nothing was left to do" in fit.said and not fit.has(expected)
    with pytest.raises(OutputRefused, match="n was 3, is 4"):
        fit.run(num_texts=4)


def test_a_fit_that_is_interrupted_keeps_its_texts(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **running: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_command, "fit_from_texts", stop)
    assert fit.run() == 130
    assert "the same command fits to them again" in fit.said
    monkeypatch.undo()
    assert fit.run() == 0
    assert "nothing was left to do" in fit.said


def test_records_of_an_earlier_job_serve_as_texts(fit: Fit, job: Job) -> None:
    config = dataclasses.replace(DRAWING, alpha=1.0)
    best = {"method": "best_of_n", "own": {"n": 3, "source": "sft"}}
    assert job.run(config, models=best) == 0
    assert fit.run() == 0
    drawn = fit.head()
    assert fit.run(prompts=None, from_records=job.output) == 0
    assert fit.has(drawn)
    assert "fitting to 18 texts of 6 prompts" in fit.said


def test_records_of_plain_sampling_are_scored(
    fit: Fit, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = dataclasses.replace(DRAWING, num_return_sequences=2)
    one = {"method": "best_of_n", "own": {"n": 1, "source": "sft"}}
    assert job.run(several, models=one) == 0
    scored: list[Any] = []
    monkeypatch.setattr(
        fit_command, "fit_and_save", lambda method, records, *others: scored.append(records) or 0
    )
    assert fit.run(prompts=None, from_records=job.output) == 0
    monkeypatch.undo()
    job.output.unlink()
    assert job.run(several, models={"method": "sft"}) == 0
    texts: list[Any] = []
    fit_from_texts = fit_command.fit_from_texts

    def note(method: Any, entries: Any, *others: Any, **running: Any) -> ValueHead:
        texts.extend(entries)
        return fit_from_texts(method, entries, *others, **running)

    monkeypatch.setattr(fit_command, "fit_from_texts", note)
    assert fit.run(prompts=None, from_records=job.output) == 0
    # Both kinds of job draw the same texts from the same streams, and one of them scored them.
    assert [entry.sequences for entry in texts] == [entry.sequences for entry in scored[0]]
    for entry, known in zip(texts, scored[0], strict=True):
        assert list(entry.rewards) == pytest.approx(known.rewards, abs=1e-5)


def test_records_of_other_methods_sources_and_models_are_refused(
    fit: Fit, job: Job, trio: Trio, tmp_path: Path
) -> None:
    best = {"method": "best_of_n", "own": {"n": 2, "source": "sft"}}
    assert job.run(DRAWING, models=best) == 0
    records = {"prompts": None, "from_records": job.output}
    with pytest.raises(
        InvalidArgument, match=r"with source='baseline', or .* by best_of_n with source='sft'"
    ):
        fit.run(source="baseline", **records)
    with pytest.raises(InvalidArgument, match=r"other models: reward was '.*/reward', is '.*other"):
        fit.run(models={"reward": str(trio.other_reward)}, **records)
    job.output.with_name("out.jsonl.settings.json").unlink()
    with pytest.raises(InvalidArgument, match=r"settings.json' cannot be read"):
        fit.run(**records)
    job.output.unlink()
    assert job.run() == 0
    with pytest.raises(InvalidArgument, match=r"were made by transfer_q$"):
        fit.run(**records)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        fit.run(prompts=None, from_records=tmp_path / "nothing.jsonl")
    assert not fit.output.exists()


def test_a_second_round_adds_texts(fit: Fit) -> None:
    assert fit.run(rounds=2) == 0
    assert fit.shown.splitlines()[0].split() == ["texts", "36"]
    assert ValueHead.load(fit.output).config.fit["rounds"] == 2


def test_texts_of_the_baseline_are_weighed_for_indirect_transfer(fit: Fit) -> None:
    config = dataclasses.replace(DRAWING, transfer="indirect", beta=2.0)
    assert fit.run(config, source="baseline") == 0
    fitted = ValueHead.load(fit.output).config.fit
    assert fitted["transfer"] == "indirect" and fitted["beta"] == 2.0


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"from_records": Path("r")}, "give prompts or from_records, got both"),
        ({}, {"prompts": None}, "give prompts or from_records, got neither"),
        ({}, {"source": "ours"}, "source must be one of"),
        ({}, {"num_texts": 0}, "num_texts must be an integer of at least 1"),
        ({}, {"rounds": 0}, "rounds must be an integer of at least 1"),
        ({}, {"epochs": 0}, "epochs must be an integer of at least 1"),
        ({}, {"models": {"sft": None}}, "sft is needed by"),
        ({}, {"models": {"reward": None}}, "reward is needed by"),
        ({"transfer": "indirect", "beta": 1.0}, {}, "needs source='baseline' and sft"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    fit: Fit,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tq_fast.presets.call.Session", refuse)
    with pytest.raises(InvalidArgument, match=message):
        fit.run(dataclasses.replace(DRAWING, **config), **changes)
    assert not fit.output.exists()


def test_a_folder_of_something_else_is_refused(fit: Fit, trio: Trio) -> None:
    with pytest.raises(InvalidArgument, match="holds another model than a value head"):
        fit.run(output=trio.sft)
    with pytest.raises(InvalidArgument, match="must be a folder, it is a file"):
        fit.run(output=fit.prompts)


def test_prompts_that_fail_are_left_out(fit: Fit) -> None:
    with fit.prompts.open("a") as file:
        file.write('{"prompt": ""}\n')
    assert fit.run() == 1
    assert "fitting to 18 texts of 6 prompts" in fit.said
    assert (fit.output / "config.json").exists()


def test_the_command_line_reaches_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(config: DecodeConfig, models: Any, job: FitJob, options: JobOptions, *others) -> int:
        seen.extend([config, models, job, options])
        return 0

    monkeypatch.setattr(fit_command, "run_fit_value", note)
    words = "fit-value --baseline b --sft s --reward r --prompts p --output o --source baseline"
    words += " --num-texts 4 --rounds 2 --epochs 3 --alpha 0.5 --beta 2 --transfer indirect"
    words += " --max-new-tokens 9 --seed 5 --batch-size 3 --overwrite"
    result = invoke(*words.split())
    assert result.exit_code == 0, result.output
    config, models, job, options = seen
    assert config == DecodeConfig(
        alpha=0.5, beta=2.0, transfer="indirect", max_new_tokens=9, seed=5
    )
    assert models["baseline"] == ["b"] and models["sft"] == "s" and models["reward"] == "r"
    assert job == FitJob("p", None, Path("o"), "baseline", num_texts=4, rounds=2, epochs=3)
    assert options.batch_size == 3 and options.overwrite
    shown = invoke("fit-value", "--help").output
    assert "--num-rollouts" not in shown and "--from-records" in shown
