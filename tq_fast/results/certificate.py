"""What is known of a response's divergence, and what Theorem 1 says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

KlKind: TypeAlias = Literal["exact", "at most", "approximate"]


def weakest_kl_kind(kinds: Iterable[KlKind]) -> KlKind:
    """Return what may be said of a mean of divergences of these kinds; "exact" of none."""
    order: tuple[KlKind, ...] = get_args(KlKind)
    return max(kinds, key=order.index, default="exact")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The divergences of one response, and the bound that holds under the prior in use.

    Theorem 1 of arXiv 2405.20495 holds for exact Q and the full vocabulary; truncation to k
    candidates adds `-log(prior mass of the k)` a step, which `kl_bound` contains. Finite roll-outs
    and horizons and imperfect baselines are not covered.

    Attributes:
        kl_to_sft: sum over the steps of KL(pi_alg || pi_sft), nats; None without an SFT model.
            `kl_kind` says what it is to the divergence of the responses' own law. Arg max
            (strategy="greedy") follows no pi_alg: there it describes the law that the tokens are
            the arg max of.
        kl_to_baseline: the same for pi_BL; None where no baseline took part.
        log_prior_mass: sum over the steps of the log prior mass of the k candidates.
        prior: the prior in use, "sft" or "baseline"; "mixture" of both for dera.
        kl_bound: bound on KL(rho_alg || rho_sft) in nats: `T r_max / alpha` under the SFT prior,
            `(1 / beta + T / alpha) r_max` under the baseline prior, `-log_prior_mass` added. None
            where the reward's bounds, or the beta that it needs, were not given, and where it does
            not hold: under the baseline prior for a baseline that was aligned to another reward,
            and for weights="published", whose Q leaves the reward's bounds.
        gap_reduction: the amount, in units of the reward, that the theorem takes off
            `beta KL(rho* || rho_sft)`, its bound on how far the reward stays below the best one:
            `alpha KL(pi_alg || pi_BL)` under the baseline prior, `alpha (KL(pi_alg || pi_sft) -
            KL(pi_BL || pi_sft))` under the SFT prior, summed over the steps. None where the theorem
            says nothing: for indirect transfer, where a model did not take part, and where a
            choice was settled without every Q.
        median_ess: median effective sample size over all steps and candidates with more than one
            roll-out; None where there is none.
        min_ess: the smallest of these sample sizes.
        kl_kind: what the mean of `kl_to_sft` and `kl_to_baseline` over responses is to the
            divergence of the law that the responses come from. "exact": the divergence itself,
            because Q carries no noise or takes no part. "at most": an upper bound, because pi_alg
            is the law given the roll-outs that were drawn, over which the law of the responses
            averages; because bounds on the reward settled choices; or because the best of several
            responses was kept. "approximate": a bound under an assumption that holds roughly.
    """

    kl_to_sft: float | None
    kl_to_baseline: float | None
    log_prior_mass: float
    prior: str
    kl_bound: float | None
    gap_reduction: float | None = None
    median_ess: float | None = None
    min_ess: float | None = None
    kl_kind: KlKind = "exact"
