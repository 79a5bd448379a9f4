"""Settings of a job: rewards that are functions have a name there, and options are stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tq_fast import DecodeConfig, RewardOptions
from tq_fast.jobs.resume import (
    ModelChoice,
    model_differences,
    model_settings,
    stated_settings,
)
from tq_fast.models.tiny import load_tiny_world


def test_a_function_is_stored_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stored_rewards.py").write_text(
        "def shortest(prompts, responses):\n    return [-len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    baseline = str(load_tiny_world().baseline)
    options = RewardOptions(keep_special_tokens=True)
    models = ModelChoice(baseline, "stored_rewards:shortest", device="cpu", reward_options=options)
    method = models.load(DecodeConfig())
    settings = model_settings(method, models)
    assert settings["reward"] == {"name": "stored_rewards:shortest", "fingerprint": "shortest"}
    assert settings["baseline"]["name"] == baseline


def test_reward_options_are_stated_only_where_they_are_given() -> None:
    more = {"traces": False, "entries": []}
    plain = stated_settings(DecodeConfig(), ModelChoice("b", "r"), **more)
    assert plain["reward_options"] is None
    pairs = ModelChoice("b", "r", reward_options=RewardOptions(pair=True))
    stated = stated_settings(DecodeConfig(), pairs, **more)["reward_options"]
    assert stated == {"pair": True, "truncate": None, "keep_special_tokens": False}


def test_own_settings_come_from_the_choice_the_config_and_the_preset() -> None:
    args = ModelChoice(method="args")
    assert args.own_settings(DecodeConfig()) == {"prior": "sft"}
    assert args.own_settings(DecodeConfig(prior="baseline")) == {"prior": "baseline"}
    best = ModelChoice(method="best_of_n", own={"n": 4})
    assert best.own_settings(DecodeConfig()) == {"n": 4, "source": "baseline", "value": None}


def test_what_a_method_fixes_is_stated_in_the_place_of_a_default() -> None:
    def stated(config: DecodeConfig, **choice: Any) -> dict[str, Any]:
        return stated_settings(config, ModelChoice(**choice), traces=False, entries=[])

    assert stated(DecodeConfig(), method="args")["horizon"] == 0
    # Another value stays, so that the preset refuses it by name.
    assert stated(DecodeConfig(horizon=5), method="args")["horizon"] == 5
    indirect = stated(DecodeConfig(beta=1.0), method="transfer_q_indirect")
    assert indirect == stated(DecodeConfig(beta=1.0, transfer="indirect"))
    assert "method" not in indirect
    dera = stated(DecodeConfig(), method="dera", own={"mix": 2.0})
    assert dera["method"] == "dera" and dera["mix"] == 2.0


def test_a_head_and_several_baselines_are_stated_by_their_contents_alone() -> None:
    choice = ModelChoice(method="value_guided", own={"value": "folder"})
    stated = stated_settings(DecodeConfig(), choice, traces=False, entries=[])
    assert "value" not in stated and stated["method"] == "value_guided"
    several = ModelChoice(reward="r", method="collab", own={"baselines": ("a", "b")})
    stated = stated_settings(DecodeConfig(), several, traces=False, entries=[])
    assert "baselines" not in stated and stated["method"] == "collab"
    assert several.names() == {"baseline": "a", "baseline_2": "b", "reward": "r"}


def test_models_of_roles_that_few_methods_have_are_compared_too() -> None:
    then = {"value": {"name": "v", "fingerprint": "1"}}
    now = {"value": {"name": "v", "fingerprint": "2"}}
    assert model_differences(then, now) == ["value 'v' has changed since"]
    assert model_differences({}, now) == ["value was not given, is 'v'"]
