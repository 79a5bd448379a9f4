"""What a preset needs and what it costs, as an evaluation must know before it runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import presets
from ..config import DecodeConfig
from .config import MethodSpec

# Every response costs about this much beside its candidates: prompts, scoring, bookkeeping.
_FIXED_WORK = 20.0
# Models that a preset cannot do without; `needed_roles` adds those that its settings ask for.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "sft": ("sft",),
    "baseline": ("baseline",),
    "dera": ("sft", "baseline"),
    "best_of_n": ("reward",),
    "args": ("reward",),
    "controlled_decoding": ("sft", "reward"),
    "transfer_q": ("baseline", "reward"),
    "direct_on_target": ("baseline", "reward"),
    "transfer_q_indirect": ("baseline", "reward"),
    "value_guided": (),
    "refine": ("reward",),
    "blocks": ("reward",),
    "collab": ("baseline", "reward"),
}
# Models that a value head may be fitted on.
PRIORS = ("sft", "baseline")
# Methods that roll candidates out token by token.
_STEERED = ("args", "transfer_q", "direct_on_target", "transfer_q_indirect", "collab")


def all_settings(method: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the own settings of the preset `method`: those given, and the defaults of others."""
    return {**presets.own_settings(method), **own}


def source_of(method: str, own: Mapping[str, Any]) -> str | None:
    """Return what a method draws its texts from; None where it names no source."""
    if method == "value_guided":
        return "value"
    return all_settings(method, own).get("source")


def needed_roles(method: str, own: Mapping[str, Any], config: DecodeConfig) -> list[str]:
    """Return the models that a method cannot do without; "prior" stands for sft or baseline."""
    needed = list(_NEEDS[method])
    source = source_of(method, own)
    if source is not None:
        needed.append("prior" if source == "value" else source)
    if method == "args":
        needed.append(all_settings(method, own)["prior"])
    elif method == "transfer_q_indirect":
        needed.append("sft" if config.needs_log_ratio else "baseline_reward")
    return needed


def measuring_roles(spec: MethodSpec) -> tuple[str, ...]:
    """Return the models that a method runs only to measure what it did.

    Whoever decodes without measuring does not pay for them.
    """
    if spec.method == "value_guided":
        return ("reward",)
    if source_of(spec.method, spec.own) == "baseline" or spec.method == "baseline":
        return ("sft",)
    if spec.method in _STEERED:
        config = spec.config(0)
        prior = spec.own.get("prior", "sft") if spec.method == "args" else config.prior
        plays = prior != "baseline" or config.candidates_from == "sft" or config.needs_log_ratio
        return () if plays else ("sft",)
    return ()


def work_of(spec: MethodSpec) -> float:
    """Estimate the work of a response by a method, in roll-out tokens a response token."""
    config, own = spec.config(0), all_settings(spec.method, spec.own)
    if spec.is_pool:
        return float(spec.num_texts)
    if spec.method in ("sft", "baseline", "dera", "value_guided"):
        return _FIXED_WORK
    if spec.method == "best_of_n":
        return _FIXED_WORK + own["n"]
    if spec.method == "refine":
        # Cuts are spread over the text, so that half of it is drawn again on average.
        return _FIXED_WORK + own["first"] + 0.5 * own["stages"] * own["branches"]
    if spec.method == "blocks":
        # A block that is completed before it is scored is drawn to the end, half of the text.
        num_blocks = max(1.0, config.max_new_tokens / own["block_len"])
        return _FIXED_WORK + own["branches"] * (num_blocks / 2 if own["judge"] == "rollout" else 1)
    horizon = 0 if spec.method == "args" else config.horizon
    # Without a horizon a roll-out goes to the end of the response, half of its length on average.
    length = config.max_new_tokens / 2 if horizon is None else horizon
    rows = config.k * config.rollouts_per_candidate
    factor = 1.4 if spec.method == "transfer_q_indirect" else 1.0
    if spec.method == "collab":
        factor = sum(role.startswith("baseline") for role in spec.models)
    return _FIXED_WORK + factor * rows * (1.0 + length)
