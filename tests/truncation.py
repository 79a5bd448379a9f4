"""Temperature, top-k and top-p applied to a law by their definitions, in fp64."""

from __future__ import annotations

import math

import torch


def truncate(law: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return the log-probs `[V]` of `law` `[V]` after temperature, then top-k, then top-p.

    `top_k` at least V and `top_p` above 1 keep everything.
    """
    probs = (law.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)[:top_k]
    share = probs[order] / probs[order].sum()
    before = share.cumsum(0) - share
    kept = order[before < top_p]
    drawn = torch.full_like(probs, -math.inf)
    drawn[kept] = (probs[kept] / probs[kept].sum()).log()
    return drawn
