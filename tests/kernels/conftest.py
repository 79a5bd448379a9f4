"""Triton says once a version that it will fuse products and sums by default no longer."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_default_for_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
