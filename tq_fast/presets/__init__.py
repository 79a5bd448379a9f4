"""Every method by its name, Transfer Q* among them, all called alike.

    presets.METHOD(prompts, baseline, reward, sft=sft, **options) -> DecodeResult

The call is that of `tq_fast.decode`: `options` are its `config`, `template_options`, `batch_size`,
`memory_budget` and `progress`, the fields of `DecodeConfig` and the keyword arguments of
`TransferDecoder`. A model that a method does not need may be left out or given; of these only `sft`
is run, to measure the divergence to it. Models that were loaded once (with `tokenizer=` beside
them) serve any number of calls.

A method fixes some fields (`FIXED_FIELDS`). Another value is refused; in `config` a field at its
default counts as not given. The methods that draw whole texts (`sft`, `baseline`, `dera`,
`best_of_n`, `value_guided`, `refine`, `blocks`) read only these fields of the config: strategy,
rollout_temperature, rollout_top_k, rollout_top_p, max_new_tokens, min_new_tokens, stop,
eos_token_id, num_return_sequences, skip_special_tokens, seed and backend; alpha where a value head
guides or `refine` and `blocks` choose by `strategy="sample"`; prior where a head guides. Their
traces have one candidate a step, the token drawn: `prior_logprobs` is its log-prob before
temperature and truncation, `final_logprobs` that of the distribution drawn from; `q` is NaN without
a head, `q_stderr` and `ess` always, and `rewards` is `[1, 0]` behind the first step, which holds
the scores. Their divergences are those of the distribution drawn from, over the whole vocabulary,
and their certificates have no `kl_bound`.

Beside the errors of `tq_fast.decode`, all methods raise `InvalidArgument` for a model that is
missing and for another value of a fixed field; the message names it and the method. Source: arXiv
2405.20495, its Algorithm 1 and the baselines of its section 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import Role, Strategy
from ..models.loading import ModelLike
from ..prompts import PromptLike
from ..results import DecodeResult
from ..rewards.base import RewardFunction
from ..session.method import MethodOptions
from .blocks import Judge, open_blocks
from .call import FIXED_FIELDS as FIXED_FIELDS
from .call import RUNNING, OpenMethod, check_running
from .collab import open_collab
from .plain import open_best_of_n, open_dera, open_plain, open_value_guided
from .refining import Cuts, open_refine
from .sources import Source, ValueLike
from .steered import open_args, open_steered

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompts: TypeAlias = PromptLike | Sequence[PromptLike]
RewardLike: TypeAlias = ModelLike | RewardFunction


def sft(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode with the SFT model alone, by sampling or by arg max (`strategy`)."""
    return _decode("sft", prompts, options, sft=sft)


def baseline(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode with the baseline alone, by sampling or by arg max (`strategy`)."""
    return _decode("baseline", prompts, options, baseline=baseline, sft=sft)


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
    return _decode("dera", prompts, options, baseline=baseline, sft=sft, mix=mix)


def best_of_n(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    n: int = 16,
    source: Source = "baseline",
    value: ValueLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Draw `n` responses from `source` and keep the first one of the highest reward.

    `source` is "baseline", "sft" or "value": the prior under the value head `value`, as
    `value_guided` draws from it.

    The `rewards` `[1, n]` of the first step of a trace are the scores of all n responses, in the
    order in which they were drawn; `result.stages` has the texts. Of several responses the steps
    have the divergence to the models that they were drawn from alone. Those of the certificate are
    upper bounds for the response that was kept: `log n - (n - 1) / n` to the distribution that it
    was drawn from; to another model its log-ratio is added, and only the mean over responses is a
    bound.
    """
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("best_of_n", prompts, options, **models, n=n, source=source, value=value)


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
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("args", prompts, options, **models, prior=prior)


def controlled_decoding(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by CD (arXiv 2310.17022): roll-outs, prior and candidates are the SFT model's."""
    return _decode("controlled_decoding", prompts, options, sft=sft, reward=reward)


def transfer_q(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by direct Transfer Q*: the baseline was aligned to `reward` itself."""
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("transfer_q", prompts, options, **models)


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
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("direct_on_target", prompts, options, **models)


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
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("transfer_q_indirect", prompts, options, **models)


def value_guided(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    value: ValueLike | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode from `pi_prior exp(Q_V / alpha) / Z` over the whole vocabulary, without roll-outs.

    `value` is a head of `tq_fast.fit_value`, or its folder; the prior is the model that it was
    fitted on: what the option `prior` says, else `sft` where that is given and `baseline` where it
    is not. One forward pass a token; Q_V has no noise, so that the divergence is exact. `reward`,
    where it is given, scores the responses. Source: Transfer Q* (arXiv 2405.20495, eq. 5) with a
    fitted Q, as value-guided decoding (arXiv 2310.17022) fits the prior's own.
    """
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("value_guided", prompts, options, **models, value=value)


def refine(  # type: ignore[misc]  # it gives the field `strategy` a default of its own
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    source: Source = "baseline",
    value: ValueLike | None = None,
    first: int = 8,
    branches: int = 8,
    stages: int = 6,
    cuts: Cuts = "even",
    strategy: Strategy = "greedy",
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Draw `first` texts, then cut the best and continue it, `stages` times.

    A stage cuts the text, draws `branches` whole continuations from `source`, and keeps the best of
    these and the text itself: the reward never falls. `cuts` are "even" (at j / (stages + 1) of the
    text), "sentence" (behind its j-th sentence), a number of tokens (at j times so many), or a list
    of them, one a stage; a text that ends before its cut stays as it is.
    `strategy="sample"` draws the text of a stage from softmax(reward / alpha) instead.

    `result.stages` says where texts were cut, what was scored and which one stayed. The
    divergences of the certificate are upper bounds, whose mean over responses counts; with even
    cuts they are approximate, since these depend on the length of the text.
    """
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    own: dict[str, Any] = {"source": source, "value": value, "first": first, "branches": branches}
    own |= {"stages": stages, "cuts": cuts, "strategy": strategy}
    return _decode("refine", prompts, options, **models, **own)


def blocks(  # type: ignore[misc]  # it gives the field `strategy` a default of its own
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    source: Source = "baseline",
    value: ValueLike | None = None,
    branches: int = 4,
    block_len: int = 25,
    judge: Judge = "prefix",
    strategy: Strategy = "greedy",
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Draw `branches` blocks of `block_len` tokens from `source`, keep one, and go on from it.

    `judge` says what the reward reads: the "prefix", prompt and text so far, or a "rollout", for
    which every block is completed by the source first. `strategy` keeps the best block ("greedy"),
    or draws one from softmax(reward / alpha) ("sample"). The divergences of the certificate are
    upper bounds: log K - (K - 1) / K a block for the best of K, and the divergence of the weights
    from equal ones otherwise.
    """
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    own: dict[str, Any] = {"source": source, "value": value, "branches": branches}
    own |= {"block_len": block_len, "judge": judge, "strategy": strategy}
    return _decode("blocks", prompts, options, **models, **own)


def collab(
    prompts: Prompts,
    baseline: ModelLike | None = None,
    reward: RewardLike | None = None,
    *,
    sft: ModelLike | None = None,
    baselines: Sequence[ModelLike] | None = None,
    **options: Unpack[MethodOptions],
) -> DecodeResult:
    """Decode by Collab: token by token, whichever of several `baselines` promises the most.

    Every baseline proposes its own k candidates and rolls them out; token and baseline are chosen
    together by `log pi_prior + Q_j / alpha`. The prior is `sft`, or the first baseline without it;
    `kl_to_baseline` is the divergence to the first one. `agents` in the traces says who proposed
    each candidate: `step.agents[step.choice]` spoke. With one baseline it equals `transfer_q`.
    """
    models = {"baseline": baseline, "sft": sft, "reward": reward}
    return _decode("collab", prompts, options, **models, baselines=baselines)


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
            value_guided,
            refine,
            blocks,
            collab,
        )
    }
)


def _decode(name: str, prompts: Prompts, options: Mapping[str, Any], **given: Any) -> DecodeResult:
    running = {key: value for key, value in options.items() if key in RUNNING}
    others = {key: value for key, value in options.items() if key not in RUNNING}
    check_running(running)
    return open_method(name, **given, **others).decode(prompts, **running)


def open_method(name: str, /, **arguments: Any) -> OpenMethod:
    """Load the models of the preset `name` for many calls.

    Args:
        name: one of `METHODS`.
        **arguments: the preset's keyword arguments, the models among them, but those of how a call
            runs: template_options, batch_size, memory_budget and progress belong to `decode`.

    Raises:
        InvalidArgument: as the preset raises it.
    """
    options = dict(arguments)
    own = {key: options.pop(key, default) for key, default in own_settings(name).items()}
    models = {role: options.pop(role, None) for role in ("baseline", "sft", "reward")}
    return _OPENERS[name](name, models, options, **own)


def own_settings(name: str) -> dict[str, Any]:
    """Return the arguments that the preset `name` has of its own, with their defaults."""
    common = ("prompts", "baseline", "reward", "sft", "options")
    parameters = inspect.signature(METHODS[name]).parameters
    return {key: found.default for key, found in parameters.items() if key not in common}


# How each preset is opened: (its name, models by role, other options, its own settings).
_OPENERS: Mapping[str, Callable[..., OpenMethod]] = MappingProxyType(
    {
        "sft": open_plain,
        "baseline": open_plain,
        "dera": open_dera,
        "best_of_n": open_best_of_n,
        "args": open_args,
        "controlled_decoding": open_steered,
        "transfer_q": open_steered,
        "direct_on_target": open_steered,
        "transfer_q_indirect": open_steered,
        "value_guided": open_value_guided,
        "refine": open_refine,
        "blocks": open_blocks,
        "collab": open_collab,
    }
)
