"""From scored roll-outs to the next token of every tree (arXiv 2405.20495, eq. 5 and 12)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from . import estimators, ops
from .config import DecodeConfig
from .models.language import LanguageForest
from .results import StepTrace
from .rollouts import Branch


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The k candidates of every tree at one step.

    Attributes:
        ids: token ids `[G, k]`.
        logprobs: log-probs `[G, k]` under the full vocabulary, by role ("baseline", "sft").
        kl_baseline_to_sft: KL(pi_BL || pi_sft) `[G]` over the full vocabulary, nats; None without
            an SFT model.
    """

    ids: torch.Tensor
    logprobs: dict[str, torch.Tensor]
    kl_baseline_to_sft: torch.Tensor | None = None


def log_ratios(sft: LanguageForest, branches: Sequence[Branch], *, vocab_size: int) -> list[float]:
    """Return log pi_sft(tau) - log q(tau) of every roll-out, q being what it was drawn from."""
    ratios = [0.0] * len(branches)
    drawn = [i for i, branch in enumerate(branches) if branch.tokens]
    if drawn:
        rows = [[branches[i].candidate, *branches[i].tokens] for i in drawn]
        logprobs = sft.score_rows(rows, [branches[i].tree for i in drawn], vocab_size=vocab_size)
        for i, logprob in zip(drawn, logprobs, strict=True):
            ratios[i] = logprob - branches[i].proposal_logprob
    return ratios


def choose(
    candidates: Candidates,
    branches: Sequence[Branch],
    scores: Sequence[float],
    *,
    baseline_scores: Sequence[float] | None,
    ratios: Sequence[float] | None,
    prior: str,
    keys: Sequence[int],
    step: int,
    config: DecodeConfig,
) -> list[StepTrace]:
    """Turn scores into values, reweight the prior and choose one candidate a tree.

    Args:
        candidates: of every tree.
        branches: every roll-out of every candidate.
        scores: the target reward of each branch.
        baseline_scores: r_BL of each branch, where the weights need it.
        ratios: `log_ratios` of each branch, where the weights need them.
        prior: the role whose policy is reweighted.
        keys: key of each tree's random stream.
        step: response tokens emitted so far.
        config: alpha, beta, estimator, strategy, seed.
    """
    ids = candidates.ids
    lengths, rewards = _by_candidate(branches, scores, ids)
    baseline_rewards = log_ratio = log_weights = None
    if baseline_scores is not None:
        _, baseline_rewards = _by_candidate(branches, baseline_scores, ids)
    if ratios is not None:
        _, log_ratio = _by_candidate(branches, ratios, ids)
    values, num_values = rewards, lengths
    if config.is_published:
        published = estimators.published_values(config, rewards, baseline_rewards, lengths)
        values, num_values = published[..., None], torch.ones_like(lengths)
    else:
        log_weights = estimators.log_weights(config, rewards, baseline_rewards, log_ratio)
    chosen = ops.reweight_sample(
        candidates.logprobs[prior],
        ids,
        values,
        log_weights,
        num_values,
        alpha=config.alpha,
        estimator=config.estimator,
        greedy=config.strategy == "greedy",
        seed=config.seed,
        keys=torch.tensor(keys, device=ids.device),
        step=step,
        backend=config.backend,
    )
    used = torch.arange(rewards.shape[2], device=ids.device) < lengths[..., None]
    return _traces(candidates, torch.where(used, rewards, math.nan), chosen, prior)


def _by_candidate(
    branches: Sequence[Branch], numbers: Sequence[float], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many numbers each candidate has `[G, k]`, and the numbers `[G, k, n]`, fp32."""
    num_trees, k = ids.shape
    table: list[list[list[float]]] = [[[] for _ in range(k)] for _ in range(num_trees)]
    for branch, number in zip(branches, numbers, strict=True):
        table[branch.tree][branch.candidate_idx].append(number)
    lengths = [[len(cell) for cell in row] for row in table]
    width = max(max(row) for row in lengths)
    padded = [[cell + [0.0] * (width - len(cell)) for cell in row] for row in table]
    return (
        torch.tensor(lengths, device=ids.device),
        torch.tensor(padded, dtype=torch.float32, device=ids.device),
    )


def _traces(
    candidates: Candidates, rewards: torch.Tensor, chosen: ops.ReweightedSample, prior: str
) -> list[StepTrace]:
    divergence = {
        role: estimators.kl_divergence(chosen.final_logprobs, logprobs).tolist()
        for role, logprobs in candidates.logprobs.items()
    }
    columns = (
        candidates.ids,
        rewards,
        chosen.q,
        chosen.q_stderr,
        chosen.ess,
        candidates.logprobs[prior],
        chosen.final_logprobs,
    )
    rows = zip(*(column.cpu() for column in columns), strict=True)
    choices = chosen.choice.tolist()
    drift = candidates.kl_baseline_to_sft
    drifts = [None] * len(choices) if drift is None else drift.tolist()
    return [
        StepTrace(
            *row,
            kl_to_sft=divergence["sft"][tree] if "sft" in divergence else None,
            kl_to_baseline=divergence["baseline"][tree],
            choice=choices[tree],
            kl_baseline_to_sft=drifts[tree],
        )
        for tree, row in enumerate(rows)
    ]
