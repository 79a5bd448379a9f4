"""The rounds in which a method draws whole texts, or blocks of them."""

from __future__ import annotations

from typing import NamedTuple


class Round(NamedTuple):
    """Draws of one prompt that the reward compares.

    Attributes:
        num: texts that are drawn.
        length: tokens of each, at most.
        before: response tokens that they follow, at most; `before + length` is a whole text.
    """

    num: int
    length: int
    before: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are drawn, at most."""
        return self.num * self.length
