"""Settings of a job: rewards that are functions have a name there, and options are stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tq_fast import DecodeConfig, RewardOptions
from tq_fast.jobs.resume import ModelChoice, model_settings, stated_settings
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
