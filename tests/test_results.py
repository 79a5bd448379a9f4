"""Results as values: equal, as JSON, and saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.presets.test_presets import PROMPTS, run
from tq_fast import Certificate, DecodeResult, DecodeStats, PromptResult, StepTrace
from tq_fast.errors import InvalidArgument
from tq_fast.presets import METHODS
from tq_fast.results import StageTrace, weakest_kl_kind


def step(**changes: object) -> StepTrace:
    fields = {
        "candidates": torch.tensor([5, 3]),
        "rewards": torch.tensor([[0.1, math.nan], [1e-30, 2.0]]),
        "q": torch.tensor([0.1, -0.0]),
        "q_stderr": torch.tensor([math.nan, 1 / 3]),
        "ess": torch.tensor([1.0, 2.0]),
        "prior_logprobs": torch.tensor([-0.1, -math.inf]),
        "final_logprobs": torch.tensor([0.0, -math.inf]),
        "kl_to_sft": None,
        "kl_to_baseline": math.inf,
        "choice": 1,
    }
    return StepTrace(**{**fields, **changes})


def result(**changes: object) -> DecodeResult:
    certificate = Certificate(
        math.inf, None, -0.25, "sft", None, min_ess=math.nan, kl_kind="at most"
    )
    stats = DecodeStats({"sft": 3}, num_steps=1, seconds={"rollout": 0.1})
    fields = {
        "texts": ["a\u2028 \U0001f600", "nan"],
        "sequences": [torch.tensor([3]), torch.tensor([], dtype=torch.int64)],
        "traces": [[step()], []],
        "certificates": [certificate, certificate],
        "stats": stats,
    }
    return DecodeResult(**{**fields, **changes})


def test_results_are_equal_by_value() -> None:
    assert step() == copy.deepcopy(step())
    assert result() == copy.deepcopy(result())
    one = PromptResult("a", torch.tensor([1]), [step()], result().certificates[0])
    assert one == copy.deepcopy(one)
    assert result() != 3 and step() != None  # noqa: E711
    # Times are never equal, and say nothing of the responses.
    assert result() == result(stats=DecodeStats())


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": torch.tensor([5, 4])},
        {"candidates": torch.tensor([5, 3], dtype=torch.int32)},
        {"q": torch.tensor([0.1, 0.2])},
        {"q": torch.tensor([0.1])},
        {"q_stderr": torch.tensor([0.0, 1 / 3])},
        {"kl_to_sft": 0.0},
        {"choice": 0},
        {"value": 0.5},
        {"agents": torch.tensor([0, 1])},
    ],
)
def test_steps_that_differ_are_not_equal(changes: dict[str, object]) -> None:
    assert step(**changes) != step()
    assert result(traces=[[step(**changes)], []]) != result()


def test_other_lengths_are_not_equal() -> None:
    assert result(traces=[[step()]]) != result()
    assert result(texts=None) != result()


def test_the_dict_is_json_with_none_for_what_is_not_finite() -> None:
    described = result().to_dict()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    (first,) = described["traces"][0]
    assert first["q_stderr"] == [None, pytest.approx(1 / 3)]
    assert first["final_logprobs"] == [0.0, None]
    assert first["kl_to_baseline"] is None
    assert described["texts"] == result().texts
    assert described["sequences"] == [[3], []]
    assert described["stats"]["token_forwards"] == {"sft": 3}
    fields = {field.name for field in dataclasses.fields(DecodeResult)}
    assert described.keys() == fields - {"tokenizer"}


def test_what_was_saved_is_loaded_again(tmp_path: Path) -> None:
    for given in (result(), result(texts=None)):
        given.save(tmp_path / "result.json")
        loaded = DecodeResult.load(str(tmp_path / "result.json"))
        assert loaded == given
        assert loaded.stats == given.stats
        assert math.isnan(loaded.certificates[0].min_ess)
        assert loaded.certificates[0].kl_kind == "at most"
        assert loaded.traces[0][0].kl_to_sft is None
    text = (tmp_path / "result.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def stage(**changes: object) -> StageTrace:
    fields = {"cut": 0, "rewards": torch.tensor([0.1, -2.0]), "choice": 0, "sequences": [[1], [2]]}
    return StageTrace(**{**fields, **changes})


def test_stages_values_and_agents_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    later = stage(cut=3, rewards=torch.tensor([1e-30]), choice=None, sequences=None)
    steps = [
        step(value=-1 / 3, agents=torch.tensor([1, 0])),
        step(value=math.inf, agents=torch.tensor([], dtype=torch.int64)),
        step(),
    ]
    given = result(traces=[steps, []], stages=[[stage(), later], []])
    given.save(tmp_path / "result.json")
    loaded = DecodeResult.load(tmp_path / "result.json")
    assert loaded == given
    (first, second), _ = loaded.stages
    assert first.rewards.dtype == torch.float32 and first.sequences == [[1], [2]]
    assert second.choice is None and second.sequences is None and second.cut == 3
    one, other, last = loaded.traces[0]
    assert one.value == -1 / 3 and one.agents.dtype == torch.int64
    assert other.value == math.inf and other.agents.shape == (0,)
    assert last.value is None and last.agents is None
    assert json.loads(json.dumps(given.to_dict(), allow_nan=False)) == given.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"cut": 1},
        {"rewards": torch.tensor([0.1, -2.5])},
        {"choice": None},
        {"sequences": [[1], [3]]},
        {"sequences": None},
    ],
)
def test_stages_that_differ_are_not_equal(changes: dict[str, object]) -> None:
    assert stage() == copy.deepcopy(stage()) != stage(**changes)
    assert result(stages=[[stage()]]) != result(stages=[[stage(**changes)]])


def test_a_mean_of_divergences_claims_no_more_than_each_of_them_does() -> None:
    assert weakest_kl_kind(["exact", "exact"]) == weakest_kl_kind([]) == "exact"
    assert weakest_kl_kind(["exact", "at most", "exact"]) == "at most"
    assert weakest_kl_kind(["approximate", "at most", "exact"]) == "approximate"


@pytest.mark.filterwarnings("ignore:transfer=")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_result_of_every_method_can_be_saved(tmp_path: Path, method: str) -> None:
    given = run(method, PROMPTS[:2], max_new_tokens=3)
    given.save(tmp_path / "result.json")
    assert DecodeResult.load(tmp_path / "result.json") == given


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{}", "'format'"),
        ("[1]", "integer"),
        ("null", "pop"),
        (
            '{"format": "tq_fast.DecodeResult 1"}',
            r"its format is 'tq_fast.DecodeResult 1', 'tq_fast.DecodeResult \d' was expected",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InvalidArgument, match=f"must be a file that DecodeResult.*{reason}"):
        DecodeResult.load(tmp_path / "other.json")
