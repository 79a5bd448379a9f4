"""`DecodeConfig` checks itself; an unknown option names the nearest known one."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from tq_fast import DecodeConfig, DecodeOptions
from tq_fast.errors import InvalidArgument
from tq_fast.models.options import LoadingOptions
from tq_fast.session.method import MethodOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 0),
        ("k", 2.5),
        ("k", True),
        ("alpha", 0.0),
        ("alpha", -1.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("alpha", "1"),
        ("alpha", 1e-320),
        ("alpha", 10**400),
        ("beta", 0),
        ("num_rollouts", 0),
        ("horizon", -1),
        ("horizon", 1.5),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("stop", ("a", "")),
        ("stop", ("a", 3)),
        ("stop", 3),
        ("num_return_sequences", 0),
        ("skip_special_tokens", 1),
        ("strategy", "beam"),
        ("rollout", "argmax"),
        ("rollout_temperature", 0.0),
        ("rollout_top_k", -1),
        ("rollout_top_p", 0.0),
        ("rollout_top_p", 1.5),
        ("prior", "reward"),
        ("candidates_from", None),
        ("transfer", "both"),
        ("weights", "log-ratio"),
        ("estimator", "median"),
        ("eos_token_id", -1),
        ("eos_token_id", (1, "2")),
        ("eos_token_id", 2.0),
        ("seed", 1.5),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("backend", "gpu"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        DecodeConfig(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


def test_an_unknown_option_names_the_nearest_known_one() -> None:
    with pytest.raises(InvalidArgument, match=r"'num_rollout'.*did you mean 'num_rollouts'"):
        DecodeConfig.from_options(num_rollout=3)


def test_an_option_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="known: k, alpha"):
        DecodeConfig.from_options(zzz=1)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("stop_strings", "stop"),
        ("temperature", "rollout_temperature"),
        ("n", "num_return_sequences"),
        ("enable_thinking", "template_options"),
    ],
)
def test_what_other_libraries_call_an_option_names_ours(name: str, ours: str) -> None:
    with pytest.raises(InvalidArgument, match=f"'{name}'; did you mean '{ours}'"):
        DecodeConfig.from_options(None, ("template_options",), **{name: 1})


def test_one_stop_string_and_several_are_kept_as_a_tuple() -> None:
    for given, kept in (("a", ("a",)), (["a", "b"], ("a", "b")), ((), ()), (None, ())):
        assert DecodeConfig(stop=given).stop == DecodeConfig(stop=given).stop_strings == kept


def test_options_replace_fields_of_a_base() -> None:
    base = DecodeConfig(k=4, alpha=0.5)
    config = DecodeConfig.from_options(base, alpha=2.0)
    assert (config.k, config.alpha) == (4, 2.0)
    assert base.alpha == 0.5


def test_indirect_transfer_needs_beta() -> None:
    with pytest.raises(InvalidArgument, match="beta"):
        DecodeConfig(transfer="indirect")
    assert DecodeConfig(transfer="indirect", beta=0.1).needs_log_ratio


def test_one_eos_id_and_several_are_kept_as_a_tuple() -> None:
    assert DecodeConfig(eos_token_id=2).eos_token_id == (2,)
    assert DecodeConfig(eos_token_id=[2, 3]).eos_token_id == (2, 3)
    assert DecodeConfig(eos_token_id=()).eos_token_id == ()
    assert DecodeConfig().eos_token_id is None


def test_greedy_rollouts_run_once() -> None:
    assert DecodeConfig(rollout="greedy", num_rollouts=4).rollouts_per_candidate == 1
    assert DecodeConfig(rollout="sample", num_rollouts=4).rollouts_per_candidate == 4


def test_without_a_horizon_rollouts_reach_the_end_of_the_response() -> None:
    config = DecodeConfig(horizon=None, max_new_tokens=5)
    assert [config.horizon_at(step) for step in range(5)] == [4, 3, 2, 1, 0]
    assert DecodeConfig(horizon=7, max_new_tokens=5).horizon_at(4) == 7


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeConfig().k = 3


def test_the_typed_options_are_the_fields_of_the_config() -> None:
    assert typing.get_type_hints(DecodeOptions) == typing.get_type_hints(DecodeConfig)


def test_the_options_of_presets_are_all_there_is() -> None:
    loading = typing.get_type_hints(LoadingOptions)
    known = {**typing.get_type_hints(MethodOptions)}
    assert known.keys() >= {*typing.get_type_hints(DecodeConfig), *loading, "config", "progress"}
    assert {name: known[name] for name in loading} == loading
