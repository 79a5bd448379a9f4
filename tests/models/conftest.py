"""Folders of small models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.makers import (
    make_model,
    make_tokenizer,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
