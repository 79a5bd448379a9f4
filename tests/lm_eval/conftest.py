"""Tests of the model for lm-evaluation-harness, which `make lm-eval-test` installs."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        skip = pytest.mark.skip(reason="lm-eval is not installed (extra `lm-eval`)")
        for item in items:
            if item.get_closest_marker("lm_eval") is not None:
                item.add_marker(skip)
