"""The paper's measures of responses (arXiv 2405.20495, section 5), as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def rep_n(words: Sequence[Any], n: int) -> float:
    """Return `100 (1 - unique n-grams / (n-grams + 1))`, in per cent.

    With the paper's `+ 1` a text without repetition is a little above 0, and one of fewer than n
    words has 100: very short texts count as repetitive.

    Args:
        words: words, or token ids.
        n: length of an n-gram, at least 1.
    """
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 100.0 * (1.0 - len(set(ngrams)) / (len(ngrams) + 1))


def diversity(words: Sequence[Any]) -> float:
    """Return the product over n = 2, 3, 4 of `1 - rep_n / 100`, in [0, 1)."""
    return math.prod(1.0 - rep_n(words, n) / 100.0 for n in (2, 3, 4))


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the cosine of two embeddings; coherence is its mean over prompts and responses.

    0 where an embedding is the zero vector.
    """
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    norms = math.hypot(*first) * math.hypot(*second)
    return dot / norms if norms > 0.0 else 0.0


def compare_scores(ours: float, theirs: float) -> float:
    """Return 1 where a judge scores our response at least as high as theirs, else 0.

    The mean of this is the win-tie rate.
    """
    return float(ours >= theirs)
