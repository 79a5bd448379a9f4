"""The methods that Transfer Q* is compared with, and itself, all called alike.

    presets.METHOD(prompts, baseline, reward, sft=sft, **options) -> DecodeResult

The call is that of `tq_fast.decode`: `options` are its `config`, `template_options`, `batch_size`,
`memory_budget` and `progress`, the fields of `DecodeConfig` and the keyword arguments of
`TransferDecoder`. A model that a method does not need may be left out or given; of these only `sft`
is run, to measure the divergence to it. Models that were loaded once (with `tokenizer=` beside
them) serve any number of calls.

A method fixes some fields (`FIXED_FIELDS`). Another value is refused; in `config` a field at its
default counts as not given. The methods without values (`sft`, `baseline`, `dera`, `best_of_n`)
read only these fields of the config: strategy, rollout_temperature, rollout_top_k, rollout_top_p,
max_new_tokens, min_new_tokens, stop, eos_token_id, num_return_sequences, skip_special_tokens, seed
and backend. Their traces have one candidate a step, the token drawn: `prior_logprobs` is its
log-prob before temperature and truncation, `final_logprobs` that of the distribution drawn from;
`q`, `q_stderr` and `ess` are NaN, and `rewards` is `[1, 0]`. Their divergences are those of the
distribution drawn from, over the whole vocabulary, and their certificates have no `kl_bound`.

Beside the errors of `tq_fast.decode`, all methods raise `InvalidArgument` for a model that is
missing and for another value of a fixed field; the message names it and the method. Source: arXiv
2405.20495, its Algorithm 1 and the baselines of its section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import Role
from ..errors import InvalidArgument
from ..models.loading import ModelLike
from ..prompts import PromptLike
from ..results import DecodeResult
from ..rewards.base import RewardFunction
from ..session import ROLES, MethodOptions
from .call import PresetCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompts: TypeAlias = PromptLike | Sequence[PromptLike]
RewardLike: TypeAlias = ModelLike | RewardFunction

# The config fields that each method fixes. Two methods have an argument instead: `prior` of args
# and `source` of best_of_n.
FIXED_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sft": {},
        "baseline": {},
        "dera": {},
        "best_of_n": {"strategy": "sample"},
        "args": {"horizon": 0, "transfer": "direct"},
        "controlled_decoding": {"prior": "sft", "candidates_from": "sft", "transfer": "direct"},
        "transfer_q": {"transfer": "direct"},
        "direct_on_target": {"transfer": "direct"},
        "transfer_q_indirect": {"transfer": "indirect"},
    }
)


def sft(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode with the SFT model alone, by sampling or by arg max (`strategy`)."""
    call = _read("sft", options, sft=sft)
    call.require("sft")
    return call.sample(prompts, {"sft": 1.0})


def baseline(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode with the baseline alone, by sampling or by arg max (`strategy`)."""
    call = _read("baseline", options, baseline=baseline, sft=sft)
    call.require("baseline")
    return call.sample(prompts, {"baseline": 1.0, "sft": 0.0})


def dera(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    mix: float = 0.5,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode from `softmax((1 - mix) log pi_sft + mix log pi_BL)` (DeRA), without a reward.

    The mixture covers the whole vocabulary rather than k candidates, and so is exact. `mix` (the
    lambda of DeRA, arXiv 2402.02992) is at least 0: 0 is the SFT model, 1 the baseline, beyond 1
    extrapolates.
    """
    call = _read("dera", options, baseline=baseline, sft=sft)
    call.require("sft", "baseline")
    is_real = isinstance(mix, (int, float)) and not isinstance(mix, bool)
    if not is_real or not math.isfinite(mix) or mix < 0:
        raise InvalidArgument(f"mix must be a finite number of at least 0, got {mix!r}")
    return call.sample(prompts, {"sft": 1.0 - mix, "baseline": float(mix)})


def best_of_n(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    n: int = 16,
    source: Role = "baseline",
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Draw `n` responses of the `source` model and keep the first one of the highest reward.

    The `rewards` `[1, n]` of the first step of a trace are the scores of all n responses, in the
    order in which they were drawn. The divergences of the steps are those of the source model.
    Those of the certificate are upper bounds for the response that was kept:
    `log n - (n - 1) / n` to the distribution that it was drawn from; to another model its log-ratio
    is added, and only the mean over responses is a bound.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidArgument(f"n must be an integer of at least 1, got {n!r}")
    _check_role("source", source)
    models = {"baseline": baseline if source == "baseline" else None, "sft": sft}
    call = _read("best_of_n", options, None, reward=reward, **models)
    call.require(source, "reward")
    weights: dict[Role, float] = {role: float(role == source) for role in ROLES}
    return call.sample(prompts, weights, num=n)


def args(  # type: ignore[misc]  # it gives the field `prior` a default of its own
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    prior: Role = "sft",
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by ARGS: the reward of the partial text replaces Q, no roll-out (arXiv 2402.01694).

    `prior` proposes the candidates and is reweighted: "sft" (ARGS-SFT) or "baseline" (ARGS-DPO).
    `strategy` is "sample" (ARGS-stochastic, over the k candidates) or "greedy".
    """
    _check_role("prior", prior)
    roles = {"prior": prior, "candidates_from": prior}
    models = {"baseline": baseline if prior == "baseline" else None, "sft": sft}
    call = _read("args", options, roles, reward=reward, **models)
    call.require(prior, "reward")
    return call.steer(prompts)


def controlled_decoding(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by CD (arXiv 2310.17022): roll-outs, prior and candidates are the SFT model's."""
    call = _read("controlled_decoding", options, sft=sft, reward=reward)
    call.require("sft", "reward")
    return call.steer(prompts)


def transfer_q(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by direct Transfer Q*: the baseline was aligned to `reward` itself."""
    call = _read("transfer_q", options, baseline=baseline, sft=sft, reward=reward)
    call.require("baseline", "reward")
    return call.steer(prompts)


def direct_on_target(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by DT: as `transfer_q`, although the baseline was aligned to another reward.

    No theorem bounds how far such a baseline is from the SFT model: under the baseline prior the
    certificate has no `kl_bound`.
    """
    call = _read("direct_on_target", options, baseline=baseline, sft=sft, reward=reward)
    call.require("baseline", "reward")
    result = call.steer(prompts)
    unbounded = [
        dataclasses.replace(one, kl_bound=None) if one.prior == "baseline" else one
        for one in result.certificates
    ]
    return dataclasses.replace(result, certificates=unbounded)


def transfer_q_indirect(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by indirect Transfer Q*: the baseline was aligned to another reward.

    `beta` is the KL weight of that alignment. `weights` is "log_ratio" (needs `sft`), or
    "reward_gap" or "published" (need `baseline_reward`).
    """
    call = _read("transfer_q_indirect", options, baseline=baseline, sft=sft, reward=reward)
    call.require("baseline", "reward")
    call.require("sft" if call.config.needs_log_ratio else "baseline_reward")
    return call.steer(prompts)


METHODS: Mapping[str, Callable[..., DecodeResult]] = MappingProxyType(
    {
        method.__name__: method
        for method in (
            sft,
            baseline,
            best_of_n,
            args,
            controlled_decoding,
            transfer_q,
            direct_on_target,
            transfer_q_indirect,
            dera,
        )
    }
)


def _read(
    method: str,
    options: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
    **models: Any,
) -> PresetCall:
    return PresetCall(method, {**FIXED_FIELDS[method], **(fixed or {})}, models, options)


def _check_role(name: str, role: object) -> None:
    if role not in ("sft", "baseline"):
        raise InvalidArgument(f"{name} must be one of 'sft', 'baseline', got {role!r}")
