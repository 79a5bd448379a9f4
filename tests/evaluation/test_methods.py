"""What the presets need, how much work they are, and which models only measure."""

from __future__ import annotations

import pytest

from tq_fast import presets
from tq_fast.config import DecodeConfig
from tq_fast.evaluation.config import MethodSpec, ModelSource, pool_of
from tq_fast.evaluation.methods import all_settings, measuring_roles, needed_roles, work_of

MODELS = {"baseline": ModelSource("b"), "sft": ModelSource("s"), "reward": ModelSource("r")}


def spec(
    method: str, own: dict | None = None, models: dict = MODELS, **decode: object
) -> MethodSpec:
    return MethodSpec(method, method, method, own or {}, decode, models, None, method)


@pytest.mark.parametrize("method", presets.METHODS)
def test_every_preset_has_its_needs_and_its_work(method: str) -> None:
    needed = needed_roles(method, {}, DecodeConfig())
    assert set(needed) <= {"sft", "baseline", "reward", "baseline_reward", "prior"}
    assert work_of(spec(method)) > 0


def test_a_source_is_a_model_that_is_needed() -> None:
    config = DecodeConfig()
    for method in ("best_of_n", "refine", "blocks"):
        assert needed_roles(method, {}, config) == ["reward", "baseline"]
        assert needed_roles(method, {"source": "sft"}, config) == ["reward", "sft"]
        assert needed_roles(method, {"source": "value"}, config) == ["reward", "prior"]
    assert needed_roles("value_guided", {}, config) == ["prior"]
    assert needed_roles("args", {"prior": "baseline"}, config) == ["reward", "baseline"]
    assert all_settings("best_of_n", {"n": 3}) == {"n": 3, "source": "baseline", "value": None}


@pytest.mark.parametrize(
    ("method", "own", "decode", "measuring"),
    [
        ("sft", {}, {}, ()),
        ("baseline", {}, {}, ("sft",)),
        ("dera", {}, {}, ()),
        ("best_of_n", {}, {}, ("sft",)),
        ("best_of_n", {"source": "sft"}, {}, ()),
        ("refine", {}, {}, ("sft",)),
        ("refine", {"source": "value"}, {}, ()),
        ("blocks", {}, {}, ("sft",)),
        # The prior is guided; the reward only says how good the response has become.
        ("value_guided", {}, {}, ("reward",)),
        ("args", {}, {}, ()),
        ("args", {"prior": "baseline"}, {"candidates_from": "baseline"}, ("sft",)),
        ("transfer_q", {}, {}, ()),
        ("transfer_q", {}, {"prior": "baseline"}, ("sft",)),
        ("transfer_q", {}, {"prior": "baseline", "candidates_from": "sft"}, ()),
        ("controlled_decoding", {}, {}, ()),
    ],
)
def test_a_model_that_is_only_measured_against_costs_nothing(
    method: str, own: dict, decode: dict, measuring: tuple[str, ...]
) -> None:
    assert measuring_roles(spec(method, own, **decode)) == measuring


def test_weights_of_indirect_transfer_are_no_measuring() -> None:
    given = {"prior": "baseline", "transfer": "indirect", "beta": 0.5}
    assert measuring_roles(spec("transfer_q_indirect", **given)) == ()
    gap = spec("transfer_q_indirect", **given, weights="reward_gap")
    assert measuring_roles(gap) == ("sft",)


def test_more_texts_are_more_work() -> None:
    assert work_of(spec("best_of_n", {"n": 8})) < work_of(spec("best_of_n", {"n": 64}))
    assert work_of(spec("refine", {"stages": 1})) < work_of(spec("refine", {"stages": 6}))
    assert work_of(spec("blocks")) < work_of(spec("blocks", {"judge": "rollout"}))
    assert work_of(pool_of(64, MODELS, {})) == 64
    small = {"k": 4, "num_rollouts": 2, "horizon": 6}
    costs = [
        work_of(spec("sft")),
        work_of(spec("best_of_n", {"n": 8})),
        work_of(spec("transfer_q", **small)),
        work_of(spec("transfer_q_indirect", **small, transfer="indirect", beta=1.0)),
        work_of(spec("transfer_q", **{**small, "horizon": None, "max_new_tokens": 64})),
    ]
    assert costs == sorted(costs) and len(set(costs)) == 5
    assert work_of(spec("args", k=4)) < costs[2]
    two = {**MODELS, "baseline_2": ModelSource("c")}
    assert work_of(spec("collab", **small)) < work_of(spec("collab", models=two, **small))
