"""The ceiling of every decoder: the most reward that any law can have at a divergence from SFT.

    C(kappa) = max { mean_x E_q r(x, y) : mean_x KL(q(.|x) || pi_sft(.|x)) <= kappa }

The problem is concave, and one multiplier alpha of the constraint serves all prompts: with it, the
Lagrangian is a sum over the prompts, and each term is largest at

    q(y|x) = pi_sft(y|x) exp(r(x, y) / alpha) / Z(x)

So the points (mean KL, mean reward) of these laws, with the same alpha for every prompt, are the
curve. From N samples of pi_sft a prompt, w_i = softmax_i(r_i / alpha) stands for q: the reward is
sum_i w_i r_i, the divergence that of w from the even law over the samples, sum_i w_i log(N w_i).

The curve of a pool is the exact ceiling of the decoders that choose among its texts, and on average
no higher than the true one: C(kappa) = min_alpha alpha (kappa + mean_x log E exp(r / alpha)), and
the mean over N samples makes the logarithm and the minimum smaller on average. With many prompts
it falls short by alpha / 2 (1 / ESS - 1 / N) to first order, ESS = 1 / sum_i w_i^2 being the
effective sample size. No divergence above log N can be seen. Points of a small ESS are marked as
not to be trusted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..jobs.record_file import Record

# Scores that have a ceiling, and their names in tables.
MEASURES = {"reward": "reward", "gold": "gold reward"}

# Below this effective sample size a few texts carry the weights: the point lies lower than the true
# ceiling by about alpha / 16 or more.
LEAST_ESS = 8.0
# alpha of the points, in standard deviations of the reward; from almost pi_sft to almost the best.
_ALPHAS = np.geomspace(64.0, 1.0 / 64.0, 97)
# Divergences that the table shows.
_TABLE_KLS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)


class CeilingPoint(NamedTuple):
    """One point of the curve.

    Attributes:
        alpha: temperature of the weights, in units of the reward; infinite for pi_sft itself.
        kl: mean divergence from pi_sft over the prompts, nats.
        value: mean expected reward over the prompts.
        ess: effective sample size of the weights, harmonic mean over the prompts.
    """

    alpha: float
    kl: float
    value: float
    ess: float

    @property
    def is_trusted(self) -> bool:
        """Whether enough texts carry the weights."""
        return self.ess >= LEAST_ESS


def ceiling_curve(
    pools: Sequence[Sequence[float]], alphas: Sequence[float] | None = None
) -> list[CeilingPoint]:
    """Return the points of the ceiling by growing divergence; the first is pi_sft.

    Args:
        pools: the rewards of samples of pi_sft, `[N]` for each prompt; N may differ.
        alphas: temperatures in units of the reward, falling; None: 97 of them, spread around the
            standard deviation of the rewards, up to where the best text has nearly all weight.
    """
    given = [np.asarray(pool, dtype=np.float64) for pool in pools]
    spread = float(np.sqrt(np.mean([pool.var() for pool in given])))
    if alphas is None:
        # A reward that never differs has one point: pi_sft.
        alphas = (spread * _ALPHAS).tolist() if spread > 0.0 else []
    return [_point(given, alpha) for alpha in itertools.chain([np.inf], alphas)]


def _point(pools: Sequence[np.ndarray], alpha: float) -> CeilingPoint:
    """Return the mean over the prompts of what weights exp(r / alpha) give."""
    found = []
    for rewards in pools:
        scores = (rewards - rewards.max()) / alpha
        weights = np.exp(scores)
        total = weights.sum()
        weights /= total
        # log(N w_i) from the scores, where log(w_i) of a weight that underflows would be -inf.
        kl = weights @ (scores - np.log(total)) + np.log(len(rewards))
        found.append((max(0.0, kl), weights @ rewards, weights @ weights))
    kl, value, inverse_ess = np.mean(found, axis=0).tolist()
    return CeilingPoint(float(alpha), kl, value, 1.0 / inverse_ess)


def ceiling_at(curve: Sequence[CeilingPoint], kl: float) -> float | None:
    """Return the ceiling at a divergence; None beyond the part of the curve that is trusted."""
    known = list(itertools.takewhile(lambda point: point.is_trusted, curve))
    if not known or kl > known[-1].kl:
        return None
    return float(np.interp(kl, [point.kl for point in known], [point.value for point in known]))


def summarise_ceiling(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the ceilings of the reward and of the gold reward, ready for JSON.

    Args:
        records: the pool of every prompt; None is returned where there is none without an error.
    """
    pools = [record["scores"] for record in records if "scores" in record]
    curves = {}
    for measure in MEASURES:
        known = [pool[measure] for pool in pools if None not in pool.get(measure, [None])]
        if known:
            curves[measure] = [_describe(point) for point in ceiling_curve(known)]
    if not curves:
        return None
    return {
        "num_texts": len(pools[0]["reward"]),
        "num_prompts": len(pools),
        "least_ess": LEAST_ESS,
        "curves": curves,
    }


def _describe(point: CeilingPoint) -> dict[str, Any]:
    # JSON has no infinite number: None stands for the alpha of pi_sft.
    alpha = point.alpha if np.isfinite(point.alpha) else None
    return {**point._asdict(), "alpha": alpha, "is_trusted": point.is_trusted}


def read_curve(described: Sequence[Mapping[str, Any]]) -> list[CeilingPoint]:
    """Return the curve that a summary holds."""
    curve = []
    for point in described:
        alpha = np.inf if point["alpha"] is None else point["alpha"]
        curve.append(CeilingPoint(alpha, point["kl"], point["value"], point["ess"]))
    return curve


def write_ceiling(ceiling: Mapping[str, Any]) -> str:
    """Return the ceilings of a summary as a table in Markdown."""
    curves = {name: read_curve(curve) for name, curve in ceiling["curves"].items()}
    titles = " | ".join(f"highest {MEASURES[name]}" for name in curves)
    lines = [
        "The ceiling: the most that any decoder can have at a divergence from SFT. It comes from "
        f"{ceiling['num_texts']} SFT samples to each of {ceiling['num_prompts']} prompts, and is "
        f"shown up to where fewer than {ceiling['least_ess']:g} samples carry the weights. "
        "The true ceiling lies a little higher.\n",
        f"| KL to SFT, nats | {titles} |",
        "|" + " --- |" * (len(curves) + 1),
    ]
    for kl in _TABLE_KLS:
        found = [ceiling_at(curve, kl) for curve in curves.values()]
        if any(value is not None for value in found):
            cells = ["" if value is None else f"{value:.2f}" for value in found]
            lines.append(f"| {kl:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
