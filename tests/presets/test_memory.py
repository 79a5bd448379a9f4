"""Memory that a method takes is free again when it returns, without waiting for the collector."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from tests.presets.test_presets import NEEDED, run
from tq_fast.forest.cache import ForestCache


@pytest.mark.parametrize("method", NEEDED)
def test_no_circle_holds_a_cache(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A circle of references would hold all KV until Python looks for circles."""
    made: list[weakref.ref[ForestCache]] = []
    begin = ForestCache.__init__

    def remember(self: ForestCache, **sizes: Any) -> None:
        begin(self, **sizes)
        made.append(weakref.ref(self))

    run(method)
    monkeypatch.setattr(ForestCache, "__init__", remember)
    gc.disable()
    try:
        run(method)
        assert made and all(cache() is None for cache in made)
    finally:
        gc.enable()
