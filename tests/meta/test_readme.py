"""The README stays short enough to be read."""

from __future__ import annotations

from tests.meta.pages import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_at_most_900_words() -> None:
    assert len(TEXT.split()) <= 900


def test_it_names_the_two_commands_that_set_up_everything() -> None:
    assert "make demo" in TEXT and "make test" in TEXT
