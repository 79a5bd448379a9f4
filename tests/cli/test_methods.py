"""`tq-fast decode --method`: every preset as a job, and the options of its own."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.decode_job import CONFIG, Job
from tests.cli.test_app import NEEDED, invoke, run_main
from tests.cli.trio import Trio
from tq_fast import DecodeConfig, presets
from tq_fast.cli import decode as decode_command
from tq_fast.cli.methods import METHOD_NAMES, OWN_OPTIONS
from tq_fast.errors import InvalidArgument
from tq_fast.jobs.record_file import OutputRefused, RecordFile
from tq_fast.jobs.resume import ModelChoice

FIELDS = {field.name for field in dataclasses.fields(DecodeConfig)}
# Settings that differ from CONFIG where a method needs some; these two stand for folders.
VALUE = "the folder of a head"
BASELINES = "the folders of two models"
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "baseline": {},
    "best_of_n": {"own": {"n": 3}},
    "args": {"config": {"horizon": 20}, "own": {"prior": "baseline"}},
    "controlled_decoding": {},
    "transfer_q": {},
    "direct_on_target": {},
    "transfer_q_indirect": {"config": {"beta": 2.0, "num_rollouts": 2}},
    "dera": {"own": {"mix": 1.5}},
    "value_guided": {"own": {"value": VALUE}},
    "refine": {"own": {"first": 3, "branches": 2, "stages": 2, "source": "sft"}},
    "blocks": {"own": {"branches": 3, "block_len": 4, "source": "sft"}},
    "collab": {"own": {"baselines": BASELINES}},
}
# Models that a method cannot do without, in the order in which it asks for them.
NEEDS = {
    "sft": ["sft"],
    "baseline": ["baseline"],
    "best_of_n": ["baseline", "reward"],
    "args": ["baseline", "reward"],
    "controlled_decoding": ["sft", "reward"],
    "transfer_q": ["baseline", "reward"],
    "direct_on_target": ["baseline", "reward"],
    "transfer_q_indirect": ["baseline", "reward", "sft"],
    "dera": ["sft", "baseline"],
    "value_guided": ["value"],
    "refine": ["sft", "reward"],
    "blocks": ["sft", "reward"],
    "collab": ["reward"],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
]


class MethodJob:
    """A job of one method, with what it needs."""

    def __init__(self, job: Job, trio: Trio, method: str) -> None:
        case = CASES[method]
        self.job, self.method = job, method
        self.config = dataclasses.replace(CONFIG, **case.get("config", {}))
        folders = {
            VALUE: str(trio.value_head()),
            BASELINES: (str(trio.baseline), str(trio.sft)),
        }
        self.own = {k: folders.get(v, v) for k, v in case.get("own", {}).items()}
        self.models = {"baseline": None} if "baselines" in self.own else {}

    def run(self, models: dict[str, Any] | None = None, own: Any = None, **options: Any) -> int:
        config = options.pop("config", self.config)
        choice = {"method": self.method, "own": self.own if own is None else own}
        choice |= {**self.models, **(models or {})}
        return self.job.run(config, models=choice, **options)


@pytest.fixture
def decode(job: Job, trio: Trio, request: pytest.FixtureRequest) -> MethodJob:
    return MethodJob(job, trio, request.param)


every_method = pytest.mark.parametrize("decode", METHOD_NAMES, indirect=True)


def test_the_tables_of_the_command_line_are_those_of_the_presets() -> None:
    assert set(METHOD_NAMES) == set(presets.METHODS) == set(CASES) == set(NEEDS)
    for method in METHOD_NAMES:
        for name, default in presets.own_settings(method).items():
            if name in FIELDS or name == "baselines":
                # These have an option among those of decoding, and of the models.
                continue
            option = OWN_OPTIONS[name]
            assert method in option.help, f"the help of --{name} does not say {method} takes it"
            if default is not None:
                assert option.default in (str(default), None) or re.search(
                    rf"\b{re.escape(str(default))} in {method}\b", option.default
                ), name


@every_method
def test_a_job_of_every_method_ends_as_an_uninterrupted_one(
    decode: MethodJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode.run(traces=True) == 0
    assert "6 of 6 prompts have a response" in decode.job.said
    assert " 0.0 tokens/s" not in decode.job.said
    expected = decode.job.records()
    settings = json.loads(decode.job.output.with_name("out.jsonl.settings.json").read_text())
    is_default = decode.method in ("transfer_q", "transfer_q_indirect")
    assert settings["settings"].get("method") == (None if is_default else decode.method)

    decode.job.output.unlink()
    append = RecordFile.append

    def stop_at_third(file: RecordFile, record: dict[str, Any]) -> None:
        if file.path.exists() and len(file.path.read_bytes().splitlines()) == 2:
            raise KeyboardInterrupt
        append(file, record)

    monkeypatch.setattr(RecordFile, "append", stop_at_third)
    assert decode.run(traces=True, batch_size=2) == 130
    monkeypatch.undo()
    assert "stopped: 2 of 6 prompts are done" in decode.job.said
    assert decode.run(traces=True, batch_size=3) == 0
    assert "resuming: 2 of 6" in decode.job.said
    found = decode.job.records()
    for index, record in expected.items():
        assert found[index]["token_ids"] == record["token_ids"]
        assert found[index]["settings"] == record["settings"]
        assert [stage["choice"] for stage in found[index].get("stages", [])] == [
            stage["choice"] for stage in record.get("stages", [])
        ]


@every_method
def test_models_that_a_method_has_no_use_for_may_be_left_out(decode: MethodJob) -> None:
    assert decode.run() == 0
    expected = decode.job.responses()
    for role in {"baseline", "sft", "reward"} - set(NEEDS[decode.method]):
        if decode.method == "value_guided" and role == "sft":
            continue
        decode.job.output.unlink(missing_ok=True)
        assert decode.run({role: None}) == 0
        if role != "sft" or decode.method not in ("transfer_q", "direct_on_target", "collab"):
            # Without an SFT model these three reweight the baseline instead.
            assert decode.job.responses() == expected


@every_method
def test_a_missing_model_is_named_before_any_is_loaded(
    decode: MethodJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tq_fast.presets.call.Session", refuse)
    for role in NEEDS[decode.method]:
        message = f"^{role} is needed by the method '{decode.method}', got None"
        with pytest.raises(InvalidArgument, match=message):
            if role == "value":
                decode.run(own={})
            else:
                decode.run({role: None})
    assert not list(decode.job.output.parent.glob("out*"))


@every_method
def test_a_setting_that_the_method_does_not_take_is_refused_by_name(decode: MethodJob) -> None:
    known = presets.own_settings(decode.method)
    for name in OWN_OPTIONS.keys() - known.keys():
        with pytest.raises(
            InvalidArgument, match=f"^{name} is no setting of the method '{decode.method}'; it"
        ):
            decode.run(own={**decode.own, name: 1})


@pytest.mark.parametrize(
    ("decode", "change", "message"),
    [
        ("best_of_n", {"own": {"n": 4}}, "n was 3, is 4"),
        ("best_of_n", {"own": {"n": 3, "source": "sft"}}, "source was 'baseline', is 'sft'"),
        ("best_of_n", {"models": {"method": None}, "own": {}}, "was 'best_of_n', is 'transfer_q'"),
        ("dera", {"own": {}}, "mix was 1.5, is 0.5"),
        ("args", {"own": {}}, "prior was 'baseline', is 'sft'"),
        ("transfer_q", {"models": {"method": "dera"}}, "method was 'transfer_q', is 'dera'"),
    ],
    indirect=["decode"],
)
def test_other_settings_of_a_methods_own_are_refused_and_named(
    decode: MethodJob, change: dict[str, Any], message: str
) -> None:
    assert decode.run() == 0
    before = decode.job.output.read_bytes()
    with pytest.raises(OutputRefused, match=message):
        decode.run(**change)
    assert decode.job.output.read_bytes() == before
    assert decode.run() == 0 and "nothing was left to do" in decode.job.said


@pytest.mark.parametrize("decode", ["value_guided"], indirect=True)
def test_a_head_is_known_by_its_contents(decode: MethodJob, trio: Trio, tmp_path: Path) -> None:
    assert decode.run() == 0
    settings = json.loads(decode.job.output.with_name("out.jsonl.settings.json").read_text())
    assert settings["models"]["value"]["name"] == str(trio.value_head())
    assert "value" not in settings["settings"]
    with pytest.raises(OutputRefused, match=r"value was '.*/value-0', is '.*/value-1'"):
        decode.run(own={"value": str(trio.value_head(1))})
    (tmp_path / "head").mkdir()
    for file in trio.value_head().iterdir():
        (tmp_path / "head" / file.name).write_bytes(file.read_bytes())
    assert decode.run(own={"value": str(tmp_path / "head")}) == 0
    with pytest.raises(InvalidArgument, match=r"value must be a ValueHead or a folder"):
        decode.run(own={"value": str(tmp_path)})


@pytest.mark.parametrize(
    ("decode", "config", "message"),
    [
        ("args", {"horizon": 5}, "horizon is 0 for the method 'args', got 5"),
        ("best_of_n", {"strategy": "greedy"}, "strategy is 'sample' for the method 'best_of_n'"),
        ("transfer_q", {"transfer": "indirect", "beta": 1.0}, "transfer is 'direct' for"),
        ("transfer_q_indirect", {"beta": None}, "beta is needed by the method"),
    ],
    indirect=["decode"],
)
def test_another_value_of_a_field_that_the_method_fixes_is_refused(
    decode: MethodJob, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        decode.run(config=dataclasses.replace(decode.config, **config))


def test_indirect_transfer_has_one_record_however_it_is_asked_for(job: Job) -> None:
    config = dataclasses.replace(CONFIG, beta=1.0, num_rollouts=2)
    assert job.run(config, models={"method": "transfer_q_indirect"}) == 0
    assert job.run(dataclasses.replace(config, transfer="indirect")) == 0
    assert "nothing was left to do" in job.said


def test_a_job_of_an_earlier_version_goes_on(job: Job, whole: Job) -> None:
    assert job.run() == 0
    settings = json.loads(job.output.with_name("out.jsonl.settings.json").read_text())
    assert not {"method", "n", "source", "value"} & set(settings["settings"])
    assert job.run(models={"method": "transfer_q"}) == 0
    assert "nothing was left to do" in job.said
    assert job.responses() == whole.responses()


@pytest.mark.parametrize("decode", ["best_of_n"], indirect=True)
def test_records_of_best_of_n_hold_every_text_with_its_reward(decode: MethodJob) -> None:
    assert decode.run() == 0
    for record in decode.job.records().values():
        (stage,) = record["stages"]
        assert set(stage) == {"cut", "rewards", "choice", "sequences"}
        assert stage["cut"] == 0 and len(stage["rewards"]) == len(stage["sequences"]) == 3
        assert stage["choice"] == stage["rewards"].index(max(stage["rewards"]))
        assert stage["sequences"][stage["choice"]] == record["token_ids"]
        assert "trace" not in record
    several = dataclasses.replace(decode.config, num_return_sequences=2)
    assert decode.run(config=several, own={"n": 1}, overwrite=True) == 0
    for record in decode.job.records().values():
        for response in (record, *record["other_responses"]):
            (stage,) = response["stages"]
            assert stage["sequences"] == [response["token_ids"]] and stage["choice"] == 0
            assert len(stage["rewards"]) == 1


@pytest.mark.parametrize("decode", ["value_guided"], indirect=True)
def test_a_trace_holds_the_value_of_a_head(decode: MethodJob) -> None:
    assert decode.run(traces=True) == 0
    for record in decode.job.records().values():
        assert all(isinstance(step["value"], float) for step in record["trace"])
        assert "agents" not in record["trace"][0] and "stages" not in record


def test_without_a_head_a_trace_has_no_value(whole: Job) -> None:
    assert not {"value", "agents"} & set(whole.records()[0]["trace"][0])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that the command was called with, instead of running it."""
    seen: dict[str, Any] = {}

    def note(config: DecodeConfig, models: ModelChoice, *others: Any) -> int:
        seen.update(config=config, models=models)
        return 0

    monkeypatch.setattr(decode_command, "run_decode", note)
    return seen


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("best_of_n --n 4 --source value --value d", {"n": 4, "source": "value", "value": "d"}),
        ("dera --mix 0.25", {"mix": 0.25}),
        ("args --prior sft", {"prior": "sft"}),
        ("args", {}),
        ("refine --cuts even", {"cuts": "even"}),
        ("refine --cuts 12 --first 8 --stages 6", {"cuts": 12, "first": 8, "stages": 6}),
        ("refine --cuts 10,20 --branches 3", {"cuts": (10, 20), "branches": 3}),
        ("blocks --block-len 25 --judge prefix", {"block_len": 25, "judge": "prefix"}),
    ],
)
def test_options_of_a_methods_own_reach_it(seen: dict, words: str, own: dict) -> None:
    method, *more = words.split()
    result = invoke(*NEEDED, "--method", method, *more)
    assert result.exit_code == 0, result.output
    assert seen["models"].method == method and seen["models"].own == own


def test_a_field_with_another_default_in_a_method_may_be_given_its_usual_one(seen: dict) -> None:
    assert invoke(*NEEDED, "--method", "refine").exit_code == 0
    assert seen["models"].own_settings(seen["config"])["strategy"] == "greedy"
    assert invoke(*NEEDED, "--method", "refine", "--strategy", "sample").exit_code == 0
    assert seen["models"].own_settings(seen["config"])["strategy"] == "sample"


def test_several_baselines_reach_a_method_that_takes_some(seen: dict) -> None:
    assert invoke(*NEEDED, "--baseline", "c", "--method", "collab").exit_code == 0
    assert seen["models"].baseline is None and seen["models"].own == {"baselines": ("b", "c")}
    assert seen["models"].names() == {"baseline": "b", "baseline_2": "c", "reward": "r"}
    result = invoke(*NEEDED, "--baseline", "c")
    message = "baseline must be one model for the method 'transfer_q', got b, c"
    assert isinstance(result.exception, InvalidArgument) and message == str(result.exception)


@pytest.mark.parametrize("decode", ["collab"], indirect=True)
def test_every_baseline_is_known_by_name_and_contents(decode: MethodJob, trio: Trio) -> None:
    assert decode.run(traces=True) == 0
    settings = json.loads(decode.job.output.with_name("out.jsonl.settings.json").read_text())
    assert settings["models"]["baseline_2"]["name"] == str(trio.sft)
    assert "baselines" not in settings["settings"]
    assert all("agents" in step for step in decode.job.records()[0]["trace"])
    one = {"baselines": (str(trio.baseline),)}
    with pytest.raises(OutputRefused, match=r"baseline_2 was '.*/sft', is not given"):
        decode.run(own=one, traces=True)


@pytest.mark.parametrize("decode", ["refine", "blocks"], indirect=True)
def test_stages_hold_their_texts_with_traces_alone(decode: MethodJob) -> None:
    assert decode.run() == 0
    plain = decode.job.records()
    assert decode.run(traces=True, overwrite=True) == 0
    for index, record in decode.job.records().items():
        assert len(record["stages"]) >= 2
        rest = [{**stage} for stage in record["stages"]]
        texts = [stage.pop("sequences", None) for stage in rest]
        assert rest == plain[index]["stages"]
        assert (texts[0] is not None) == (decode.method == "refine")


@pytest.mark.parametrize("word", ["odd", "1,,2", "1.5"])
def test_cuts_that_are_no_places_are_refused(seen: dict, word: str) -> None:
    result = invoke(*NEEDED, "--cuts", word)
    assert result.exit_code == 2 and "--cuts" in result.output and not seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method best", "method 'best' is unknown; did you mean 'best_of_n'?"),
        ("--n 3", "n is no setting of the method 'transfer_q'; it has none of its own"),
        (
            "--method best_of_n --mix 1",
            "mix is no setting of the method 'best_of_n'; its own are n, source, value",
        ),
        ("--method best_of_n", "baseline is needed by the method 'best_of_n', got None"),
        ("", "baseline is needed by the method 'transfer_q', got None"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: str,
    message: str,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    files = ["--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    assert run_main(monkeypatch, "decode", *files, *words.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"tq-fast: error: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_the_help_has_the_options_of_methods_in_a_panel_of_their_own() -> None:
    shown = invoke("decode", "--help").output
    methods = shown[shown.index("─ Method ") : shown.index("─ Settings of some methods alone ")]
    assert "--method " in methods and all(name in methods for name in METHOD_NAMES)
    panel = shown[shown.index("─ Settings of some methods alone ") : shown.index("─ Search ")]
    for name in OWN_OPTIONS:
        assert f"--{name.replace('_', '-')} " in panel
