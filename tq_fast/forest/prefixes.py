"""The common start of sequences, and prefixes that copy it from one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .cache import ForestCache

# Lists and tuples alike, but no two of them side by side: they do not compare.
_Tokens = TypeVar("_Tokens", list[int], tuple[int, ...])

# Tokens from which a copy of their KV is worth looking for.
_WORTHWHILE = 16


def common_length(rows: Sequence[_Tokens]) -> int:
    """Return how many tokens all `rows` start with in common."""
    # All rows stand between the least and the greatest, and start with what these two share.
    low, high = min(rows), max(rows)
    known, unknown = 0, min(len(low), len(high))
    while known < unknown:
        middle = (known + unknown + 1) // 2
        if low[known:middle] == high[known:middle]:
            known = middle
        else:
            unknown = middle - 1
    return known


def share_prefix(cache: ForestCache, tree: int, tokens: _Tokens, texts: Sequence[_Tokens]) -> int:
    """Copy the KV of the longest start that `tokens` has in common with another tree's prefix.

    Args:
        cache: the prefix of `tree` in it is empty.
        tree: the tree that is to hold `tokens`.
        tokens: the text to be encoded.
        texts: the text of each tree's prefix, of which `cache.prefix_len` tokens are encoded.

    Returns:
        How many tokens `tree` holds now.
    """
    best, source = 0, tree
    for other, text in enumerate(texts):
        held = cache.prefix_len[other]
        if other != tree and held > best:
            length = common_length([text[:held], tokens])
            if length > best:
                best, source = length, other
    if best < _WORTHWHILE:
        return 0
    cache.copy_prefix(source, tree, best)
    return best
