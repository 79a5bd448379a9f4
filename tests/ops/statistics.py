"""Whether counts of draws fit the probabilities that they should follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square_excess(ids: Tensor, probabilities: Tensor) -> float:
    """How far Pearson's statistic lies above its mean, in standard deviations.

    Tokens that expect fewer than 5 draws share one bin, which counts if it expects 5 itself. The
    bound of the tests is 10; the seeds are fixed, so a right sampler that passes once always does.

    Args:
        ids: int64, the draws.
        probabilities: float64 `[V]`, summing to 1.
    """
    counts = torch.bincount(ids, minlength=probabilities.numel()).double()
    expected = probabilities * ids.numel()
    small = expected < 5
    counts = torch.cat((counts[~small], counts[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    counts, expected = counts[expected >= 5], expected[expected >= 5]
    freedom = counts.numel() - 1
    if freedom < 1:
        return 0.0
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)
