"""The choice of the next token from scored roll-outs (arXiv 2405.20495, eq. 5 and 12)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from .. import ops
from ..config import DecodeConfig, Role
from ..results import StepTrace
from .certificate import greatest_kl, kl_divergence
from .pruning import LazyArgmax, StepValues
from .weights import log_weights, published_values


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The k candidates of every tree at one step, on the CPU.

    Attributes:
        ids: token ids `[G, k]`.
        logprobs: log-probs `[G, k]` under the full vocabulary, by role ("baseline", "sft").
        kl_baseline_to_sft: KL(pi_BL || pi_sft) `[G]` over the full vocabulary, nats; None without
            an SFT model.
    """

    ids: torch.Tensor
    logprobs: Mapping[Role, torch.Tensor]
    kl_baseline_to_sft: torch.Tensor | None = None


def choose(
    candidates: Candidates,
    values: StepValues,
    *,
    prior: Role,
    keys: torch.Tensor,
    lazy: LazyArgmax | None,
    config: DecodeConfig,
) -> list[StepTrace]:
    """Turn rewards into values, reweight the prior and choose one candidate a tree.

    The k x n numbers are reweighted on the CPU, where the scores are: to take them to a GPU and to
    wait for the choice would take longer than the choice.

    Args:
        candidates: the candidates of every tree.
        values: the rewards of their roll-outs.
        prior: the role whose policy is reweighted.
        keys: keys of each tree's random stream at this step, int64 `[G]`.
        lazy: the bounds that settled the choice; None where every roll-out has come in.
        config: how roll-outs are weighed and the choice is made.
    """
    prior_logprobs = candidates.logprobs[prior]
    unknown = ~values.is_complete
    if lazy is not None:
        beaten = ~lazy.contenders(values) & unknown.any(1, keepdim=True)
        prior_logprobs = prior_logprobs.masked_fill(beaten, -math.inf)
    rewards, weights, lengths = _weighed(values, config)
    chosen = ops.reweight_sample(
        prior_logprobs,
        candidates.ids,
        rewards,
        weights,
        lengths,
        alpha=config.alpha,
        estimator=config.estimator,
        greedy=config.strategy == "greedy",
        seed=config.seed,
        keys=keys,
        step=0,
        backend=config.backend,
    )
    divergences = _divergences(candidates, values, chosen.final_logprobs, prior, lazy, config)
    is_open = unknown.any(1, keepdim=True)
    columns = {
        "candidates": candidates.ids,
        "rewards": values.rewards,
        "q": chosen.q.masked_fill(unknown, math.nan),
        "q_stderr": chosen.q_stderr.masked_fill(unknown, math.nan),
        "ess": chosen.ess.masked_fill(unknown, math.nan),
        "prior_logprobs": candidates.logprobs[prior],
        "final_logprobs": chosen.final_logprobs.masked_fill(is_open, math.nan),
    }
    choices = chosen.choice.tolist()
    drift = candidates.kl_baseline_to_sft
    drifts = [None] * len(choices) if drift is None else drift.tolist()
    return [
        StepTrace(
            candidates=columns["candidates"][tree],
            rewards=columns["rewards"][tree],
            q=columns["q"][tree],
            q_stderr=columns["q_stderr"][tree],
            ess=columns["ess"][tree],
            prior_logprobs=columns["prior_logprobs"][tree],
            final_logprobs=columns["final_logprobs"][tree],
            kl_to_sft=divergences["sft"][tree] if "sft" in divergences else None,
            kl_to_baseline=divergences["baseline"][tree] if "baseline" in divergences else None,
            choice=choices[tree],
            kl_baseline_to_sft=drifts[tree],
        )
        for tree in range(len(choices))
    ]


def _weighed(
    values: StepValues, config: DecodeConfig
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return values `[G, k, n]`, their log-weights and their number `[G, k]`."""
    rewards = values.rewards.nan_to_num(nan=0.0)
    lengths = values.num_rollouts
    baseline_rewards = values.baseline_rewards.nan_to_num(nan=0.0)
    if config.is_published:
        published = published_values(config, rewards, baseline_rewards, lengths)
        return published[..., None], None, torch.ones_like(lengths)
    log_ratio = values.log_ratio.nan_to_num(nan=0.0)
    return rewards, log_weights(config, rewards, baseline_rewards, log_ratio), lengths


def _divergences(
    candidates: Candidates,
    values: StepValues,
    final_logprobs: torch.Tensor,
    prior: Role,
    lazy: LazyArgmax | None,
    config: DecodeConfig,
) -> dict[Role, list[float]]:
    """Return KL(pi_alg || pi) of every tree, by role; an upper bound where some Q is unknown."""
    divergences = {
        role: kl_divergence(final_logprobs, logprobs).tolist()
        for role, logprobs in candidates.logprobs.items()
    }
    open_trees = (~values.is_complete).any(1).nonzero().squeeze(1).tolist()
    if open_trees and lazy is not None:
        low, high = lazy.value_bounds(values)
        for role, logprobs in candidates.logprobs.items():
            for tree in open_trees:
                divergences[role][tree] = greatest_kl(
                    candidates.logprobs[prior][tree],
                    logprobs[tree],
                    low[tree] / config.alpha,
                    high[tree] / config.alpha,
                )
    return divergences
