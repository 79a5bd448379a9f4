"""The benches that are programs of their own fit the library, as tiny models show."""

from __future__ import annotations

import dataclasses

import torch

from bench import account, decode_models
from bench.decode_models import Duo
from bench.pictures import read_options
from tests import zoo
from tests.meta.pages import ROOT
from tq_fast import SpeedOptions


def small_duo() -> Duo:
    small = {"vocab_size": 50, "max_position_embeddings": 128}
    return Duo(zoo.language_model("llama", **small), zoo.classifier("llama", **small))


def test_the_account_finds_every_phase(monkeypatch) -> None:
    monkeypatch.setattr(account, "prompt_of", lambda length: torch.arange(length) % 50)
    setting = account.Setting("fp32", prompt=9, k=3, num_rollouts=2, horizon=3, tokens=2)
    seconds, result, kernels = account.measure_phases(small_duo(), setting)
    assert {"rollout forward", "sampling", "reward", "commit", "prefill"} <= seconds.keys()
    assert len(result.sequences[0]) == 3
    assert sum(kernels.values()) > 0


def test_the_models_of_the_benches_keep_their_weights_in_another_dtype() -> None:
    duo = small_duo()
    half = duo.to(decode_models.DTYPES["bf16"])
    for whole, rounded in zip(duo.baseline.parameters(), half.baseline.parameters(), strict=True):
        assert torch.equal(whole.bfloat16(), rounded)


def test_the_stored_table_of_speed_options_is_drawn_under_the_names_that_they_have() -> None:
    table = ROOT / "bench" / "results" / "2026-11-21-cpu-levers-epyc.txt"
    drawn = {info["option"]: info for info in read_options(table.read_text(encoding="utf-8"))}
    fields = {field.name for field in dataclasses.fields(SpeedOptions)}
    assert {name for names in drawn for name in names.split(" and ")} <= fields
    assert len(drawn) == 8
    assert drawn["cpu_layers"]["ratio"] == 2.90
    assert drawn["refill_slots"]["forwards"] == {"baseline": 1.01, "reward": 1.0}
