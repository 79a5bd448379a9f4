"""Forests that stay between two decodes of a decoder: nothing is captured twice, nothing leaks."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tq_fast
from tests.fixed_addresses import fixed_addresses, no_graphs
from tests.test_other_device import random_head
from tests.test_speed_options import ENDS, PROMPTS, assert_same, language_model, share_of_low
from tq_fast.forest.graphs import Graphs
from tq_fast.forest.language import LanguageForest
from tq_fast.forest.store import ForestStore
from tq_fast.presets import open_method

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")

SETTINGS: dict[str, Any] = {"k": 4, "horizon": 3, "max_new_tokens": 4, "eos_token_id": ENDS}

SHORTER = [prompt[:2] for prompt in PROMPTS]


def captures(patch: pytest.MonkeyPatch) -> list[Any]:
    """Within the test, the list of all that is captured."""
    seen: list[Any] = []
    graph = Graphs.graph

    def noted(self: Graphs, key: Any, step: Any, trial: Any) -> Any:
        if key not in self._replays:
            seen.append(key)
        return graph(self, key, step, trial)

    patch.setattr(Graphs, "graph", noted)
    return seen


def test_a_decoder_captures_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(scale=2.0)
    decoder = tq_fast.TransferDecoder(model, share_of_low)
    with fixed_addresses():
        seen = captures(monkeypatch)
        first = decoder.decode(PROMPTS, num_rollouts=2, **SETTINGS)
        assert seen
        seen.clear()
        again = decoder.decode(PROMPTS, num_rollouts=2, **SETTINGS)
        assert not seen
        # Shorter prompts fit into the same buffers.
        (kept,) = decoder.session.forests._kept
        second = decoder.decode(SHORTER, num_rollouts=2, **SETTINGS)
        assert decoder.session.forests._kept == [kept]
    with no_graphs():
        truth = tq_fast.TransferDecoder(model, share_of_low)
        assert_same(first, truth.decode(PROMPTS, num_rollouts=2, **SETTINGS))
        assert_same(second, truth.decode(SHORTER, num_rollouts=2, **SETTINGS))
    assert_same(again, first)


def test_other_settings_have_other_graphs_of_roll_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tq_fast.TransferDecoder(language_model(scale=2.0), share_of_low)
    with fixed_addresses() as made:
        decoder.decode(PROMPTS, num_rollouts=2, seed=1, **SETTINGS)
        num = len(made)
        warm = decoder.decode(PROMPTS, num_rollouts=2, seed=2, **SETTINGS)
        assert len(made) == num + 1
    with no_graphs():
        plain = tq_fast.TransferDecoder(language_model(scale=2.0), share_of_low)
        assert_same(warm, plain.decode(PROMPTS, num_rollouts=2, seed=2, **SETTINGS))


@pytest.mark.parametrize("method", ["sft", "value_guided", "refine"])
def test_a_method_of_whole_texts_captures_nothing_twice(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"sft": {}, "value_guided": {"value": random_head()}}.get(
        method, {"source": "sft", "first": 2, "branches": 2, "stages": 2}
    )
    if method != "sft":
        own["reward"] = share_of_low
    opened = open_method(
        method, sft=language_model(seed=2, scale=2.0), max_new_tokens=6, eos_token_id=(), **own
    )
    with fixed_addresses():
        seen = captures(monkeypatch)
        first = opened.decode(PROMPTS)
        assert seen
        seen.clear()
        assert_same(opened.decode(PROMPTS), first)
        assert not seen


def test_longer_prompts_take_the_place_of_forests_that_are_too_small() -> None:
    decoder = tq_fast.TransferDecoder(language_model(scale=2.0), share_of_low)
    longer = [prompt * 4 for prompt in PROMPTS]
    with fixed_addresses():
        decoder.decode(PROMPTS, **SETTINGS)
        ours = decoder.decode(longer, **SETTINGS)
        (kept,) = decoder.session.forests._kept
        assert kept.forest.cache.prefix_capacity >= max(map(len, longer))
    with no_graphs():
        plain = tq_fast.TransferDecoder(language_model(scale=2.0), share_of_low)
        assert_same(ours, plain.decode(longer, **SETTINGS))


def test_memory_goes_with_the_decoder_and_without_graphs_with_the_decode() -> None:
    forests: list[weakref.ReferenceType[LanguageForest]] = []
    begin = LanguageForest.__init__

    def noted(self: LanguageForest, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        forests.append(weakref.ref(self))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageForest, "__init__", noted)
            decoder = tq_fast.TransferDecoder(language_model(scale=2.0), share_of_low)
            with no_graphs():
                decoder.decode(PROMPTS, **SETTINGS)
            assert forests and not any(forest() for forest in forests)
            with fixed_addresses():
                decoder.decode(PROMPTS, **SETTINGS)
                assert forests[-1]() is not None
                del decoder
                assert forests[-1]() is None
    finally:
        gc.enable()


def test_a_forest_in_use_is_not_given_away_and_a_failure_leaves_none() -> None:
    model, store = language_model(), ForestStore()
    sizes = {"num_trees": 1, "num_rows": 2, "prefix_capacity": 8, "branch_capacity": 2}
    options: dict[str, Any] = {**sizes, "backend": None, "graphs": True}
    with fixed_addresses():
        first, lease = store.open(LanguageForest, model, **options)
        second, other = store.open(LanguageForest, model, **options)
        assert first is not second
        del other
        assert store.open(LanguageForest, model, **options)[0] is second
        decoder = tq_fast.TransferDecoder(model, lambda prompts, responses: [torch.nan] * 99)
        with pytest.raises(tq_fast.RewardError):
            decoder.decode(PROMPTS, **SETTINGS)
        assert not decoder.session.forests._kept
    assert lease is not None


def test_two_threads_never_get_the_same_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = language_model(), ForestStore()
    sizes = {"num_trees": 1, "num_rows": 2, "prefix_capacity": 8, "branch_capacity": 2}
    options: dict[str, Any] = {**sizes, "backend": None, "graphs": True}
    begin = LanguageForest.begin

    def begin_slowly(forest: LanguageForest, num_trees: int) -> None:
        # The other thread asks for a forest meanwhile.
        time.sleep(0.05)
        begin(forest, num_trees)

    with fixed_addresses():
        (free, lease) = store.open(LanguageForest, model, **options)
        del lease
        monkeypatch.setattr(LanguageForest, "begin", begin_slowly)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(store.open, LanguageForest, model, **options) for _ in range(2)]
            (one, _one_lease), (other, _other_lease) = (call.result() for call in calls)
    assert one is not other and free in (one, other)
