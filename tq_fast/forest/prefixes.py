"""What sequences have in common, and prefixes that take it over from one another."""

from __future__ import annotations

from collections.abc import Sequence

from .cache import ForestCache

# Tokens from which a copy of their KV is worth looking for.
_WORTHWHILE = 16


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all `rows` start with in common."""
    # What the least and the greatest row share, all rows in between share too.
    low, high = min(rows), max(rows)
    known, unknown = 0, min(len(low), len(high))
    while known < unknown:
        middle = (known + unknown + 1) // 2
        if low[known:middle] == high[known:middle]:
            known = middle
        else:
            unknown = middle - 1
    return known


def share_prefix(
    cache: ForestCache, tree: int, tokens: Sequence[int], texts: Sequence[Sequence[int]]
) -> int:
    """Copy the KV of the longest start that `tokens` has in common with another tree's prefix.

    Args:
        cache: the prefix of `tree` in it is empty.
        tree: the tree that is to hold `tokens`.
        tokens: what it is to hold.
        texts: what the prefix of each tree holds, or will hold once it is encoded.

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
