"""The forests of one decode: how large they must be, and opening them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..config import DecodeConfig
from ..forest.language import LanguageForest
from ..forest.support import check_runs
from ..prompts import Prompt
from ..results import Response
from ..rewards.base import Opening, Reward
from ..rewards.causal import CausalReward
from ..rewards.scorer import Scorer
from ..rollouts.graphs import RolloutGraphs
from ..rollouts.state import RolloutSampler
from .budget import MemoryPerPrompt
from .step import DecodePlan, Roles


@dataclasses.dataclass(frozen=True)
class Models:
    """What a decode works with."""

    baseline: PreTrainedModel
    sft: PreTrainedModel | None
    reward: Reward
    baseline_reward: Reward | None


def open_roles(
    models: Models, active: list[Response], waiting: Sequence[Response], plan: DecodePlan
) -> Roles:
    """Open a forest for each model, with a slot for each of `active`.

    Args:
        models: the models.
        active: what is decoded first; the caller's list, which changes as slots are refilled.
        waiting: what will take their rollout_ids.
        plan: what the decode keeps to.
    """
    config = plan.config
    num_slots = len(active)
    num_rows = max(num_slots, min(plan.max_rows, num_slots * rows_per_slot(config)))
    branch = _branch_capacity(config)
    prompts = [response.prompt for response in active]
    later = [response.prompt for response in waiting]
    sizes = {
        "num_trees": num_slots,
        "prefix_capacity": _prefix_capacity([*prompts, *later], config),
        "backend": config.backend,
        "cpu_layers": plan.speed.cpu_layers,
    }

    opening = Opening(
        prompts,
        num_rows=num_rows,
        max_new=config.max_new_tokens + branch,
        backend=config.backend,
        waiting=later,
    )

    def score_by(reward: Reward, bounds: tuple[float, float] | None) -> Scorer:
        session = reward.open(opening)
        return Scorer(session, active, bounds=bounds, remembers=plan.speed.score_once)

    for model in filter(None, (models.baseline, models.sft)):
        check_runs(model)
    sft = None
    if models.sft is not None:
        sft = LanguageForest(
            models.sft,
            num_rows=num_rows if config.needs_log_ratio else num_slots,
            branch_capacity=branch if config.needs_log_ratio else 1,
            **sizes,
        )
    baseline = LanguageForest(models.baseline, num_rows=num_rows, branch_capacity=branch, **sizes)
    vocab_size = min(forest.vocab_size for forest in (baseline, sft or baseline))
    eos = torch.tensor(plan.eos, dtype=torch.int64, device=baseline.device)
    sampler = RolloutSampler(eos, vocab_size, config)
    has_graphs = plan.speed.graph_rollouts and baseline.device.type == "cuda"
    return Roles(
        baseline=baseline,
        sft=sft,
        reward=score_by(models.reward, plan.reward_bounds),
        baseline_reward=score_by(models.baseline_reward, None)
        if config.needs_baseline_reward
        else None,
        sampler=sampler,
        graphs=RolloutGraphs(baseline, sampler) if has_graphs else None,
    )


def memory_per_prompt(
    models: Models, prompts: Sequence[Prompt], config: DecodeConfig
) -> MemoryPerPrompt:
    """Bytes of a slot and of a roll-out, for the longest of `prompts`."""
    prefix, branch = _prefix_capacity(prompts, config), _branch_capacity(config)
    per_token = check_runs(models.baseline)
    logits = 2 * 4 * models.baseline.get_output_embeddings().weight.shape[0]
    per_slot, per_row = per_token * prefix, per_token * (branch + 1) + logits
    if models.sft is not None:
        per_token = check_runs(models.sft)
        per_slot += per_token * (prefix + 1)
        per_row += per_token * branch if config.needs_log_ratio else 0
    for reward in (models.reward, models.baseline_reward if config.needs_baseline_reward else None):
        if isinstance(reward, CausalReward):
            per_token = check_runs(reward.model)
            per_slot += per_token * (prefix + branch)
            per_row += per_token * (branch + 2)
    return MemoryPerPrompt(per_slot, per_row, rows_per_slot(config))


def rows_per_slot(config: DecodeConfig) -> int:
    """Roll-outs of one prompt."""
    return config.k * config.rollouts_per_candidate


def _prefix_capacity(prompts: Sequence[Prompt], config: DecodeConfig) -> int:
    return max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens


def _branch_capacity(config: DecodeConfig) -> int:
    return max(1, config.max_new_tokens if config.horizon is None else config.horizon)
