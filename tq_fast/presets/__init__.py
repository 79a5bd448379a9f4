"""The methods that Transfer Q* is compared with, and itself, all called alike.

    presets.METHOD(prompts, baseline, reward, sft=sft, **options) -> DecodeResult

The call is that of `tq_fast.decode`: `options` are its `config`, `template_options`, `batch_size`,
`memory_budget` and `progress`, the fields of `DecodeConfig` and the keyword arguments of
`TransferDecoder`. A model that a method does not need may be left out or given; only `sft` is run
beside a method that needs it not, for the divergence to it. Models that were loaded once (with
`tokenizer=` beside them) serve any number of calls.

A method fixes some fields (`FIXED_FIELDS`). Another value is refused; in `config` a field at its
default counts as not given. The methods without values (`sft`, `baseline`, `dera`, `best_of_n`)
read of the config strategy, rollout_temperature, rollout_top_k, rollout_top_p, max_new_tokens,
min_new_tokens, stop, eos_token_id, num_return_sequences, skip_special_tokens, seed and backend, and
no other. Their traces have one candidate a step, the token
drawn: `prior_logprobs` before temperature and truncation, `final_logprobs` the density drawn from,
`q`, `q_stderr` and `ess` NaN, `rewards` `[1, 0]`; their divergences are those of the law drawn
from, over the whole vocabulary, and their certificates have no `kl_bound`.

All raise, beside what `tq_fast.decode` raises, `InvalidArgument` for a model that is missing and
for a field that is fixed; the message names it and the method. Source: arXiv 2405.20495, its
Algorithm 1 and the baselines of its section 4.
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

# What each method fixes; `prior` of args and `source` of best_of_n are arguments of their own.
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
    """Plain decoding of the SFT model: a sample of its law, or arg max (`strategy`)."""
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
    """Plain decoding of the baseline: a sample of its law, or arg max (`strategy`)."""
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
    """Decoding-time realignment: `softmax((1 - mix) log pi_sft + mix log pi_BL)`, no reward.

    Over the whole vocabulary, not over k candidates, and so exact. `mix` (the lambda of DeRA, arXiv
    2402.02992) is at least 0: 0 is the SFT model, 1 the baseline, beyond 1 extrapolates.
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
    """`n` full responses of the `source` model; the highest reward wins, the first among equals.

    The `rewards` `[1, n]` of the first step of a trace are the scores of all n responses, in the
    order that they were drawn in. The divergences of its steps are those of the source's own law;
    those of the certificate bound that of the winner's: at most `log n - (n - 1) / n` to what it
    was drawn from and, to another model, the log-ratio of the winner more, whose mean over
    responses is what bounds.
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
    """ARGS: the reward of the partial text in the place of Q, no roll-out (arXiv 2402.01694).

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
    """CD (arXiv 2310.17022): roll-outs, prior and candidates all from the SFT model."""
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
    """Direct Transfer Q*: the baseline was aligned to `reward` itself."""
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
    """DT: the steps of `transfer_q` although the baseline was aligned to another reward.

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
    """Indirect Transfer Q*: the baseline was aligned to another reward, with KL weight `beta`.

    `weights` is "log_ratio" (needs `sft`), or "reward_gap" or "published" (need `baseline_reward`).
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
