"""Whether what stands in for a module computes what the module computes, up to rounding."""

from __future__ import annotations

import torch


def is_close(ours: object, truth: object) -> bool:
    """Whether two results agree row for row: up to rounding at most, and far better on average."""
    if not isinstance(ours, torch.Tensor) or not isinstance(truth, torch.Tensor):
        return False
    if ours.shape != truth.shape or ours.dtype != truth.dtype:
        return False
    eps = torch.finfo(truth.dtype).eps
    # In units of eps, the greatest and the mean error. Sums of fp32 in another order were seen to
    # differ by 92 and 42, results of 16 bits, which are rounded where the modules round, by 0.6
    # and 0.3.
    at_most, on_average = (512, 128) if truth.dtype is torch.float32 else (8, 1)
    for mine, theirs in zip(ours.double(), truth.double(), strict=True):
        error = (mine - theirs).abs()
        most, mean = theirs.abs().max(), theirs.abs().mean()
        if not bool(error.max() <= at_most * eps * most):
            return False
        if not bool(error.mean() <= on_average * eps * mean):
            return False
    return True
