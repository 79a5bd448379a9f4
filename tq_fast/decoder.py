"""`decode` and `TransferDecoder`: what users call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import check_bounds, check_loading, place_models
from .config import DecodeConfig, SpeedOptions
from .errors import InvalidArgument
from .models.loading import (
    ModelLike,
    TokenizerLike,
    check_same_vocabulary,
    end_token_ids,
    evaluating,
    load_language_model,
    load_reward,
    load_tokenizer,
)
from .progress import TokenBar
from .prompts import Prompt, PromptLike, PromptReader, read_prompts
from .results import Certificate, DecodeResult, DecodeStats, PromptResult, Response, carry_finished
from .rewards.base import RewardFunction, Texts
from .rewards.lengths import check_fits
from .transfer.budget import BatchShape, check_sizes, fit_forest, smaller_after
from .transfer.loop import DecodeLoop
from .transfer.roles import Models, memory_per_prompt, open_roles, rows_per_slot
from .transfer.step import DecodePlan
from .transfer.warnings import known_ess, warn_of_collapse, warn_of_noise
from .transfer.weights import certify

_MODEL_ARGUMENTS = (
    "sft",
    "baseline_reward",
    "tokenizer",
    "reward_tokenizer",
    "baseline_reward_tokenizer",
    "reward_index",
    "reward_bounds",
    "device",
    "dtype",
    "speed",
)
_RUN_ARGUMENTS = ("config", "batch_size", "memory_budget", "progress")


def decode(
    prompts: PromptLike | Sequence[PromptLike],
    baseline: ModelLike,
    reward: ModelLike | RewardFunction,
    *,
    config: DecodeConfig | None = None,
    batch_size: int = 8,
    memory_budget: int | None = None,
    progress: bool = False,
    **options: Any,
) -> DecodeResult:
    """Decode `prompts` with Transfer Q* (arXiv 2405.20495, Algorithm 1).

    Equals, for each new token: take the k likeliest next tokens, complete each with `baseline`,
    score the whole texts with `reward`, and sample from `softmax(log pi_prior + Q / alpha)`.

    Args:
        prompts: text, chat messages or token ids (a tensor or a list of integers), or a list of
            any of these.
        baseline: the aligned model that rolls out: a hub id, a local folder or a loaded model.
        reward: a sequence classifier (hub id, folder or model; any tokenizer), or a function
            `(prompts, responses) -> floats`.
        config: settings to start from; `options` replace its fields.
        batch_size: prompts that are decoded together, at most; one that is finished makes room
            for the next. Results do not depend on it.
        memory_budget: bytes of KV and logits at most, over all models (weights not counted);
            prompts, and then roll-outs, that do not fit together run one after the other, with
            the same results. None: as much as batch_size takes.
        progress: show a progress bar.
        **options: every field of `DecodeConfig`, and the keyword arguments of `TransferDecoder`.

    Returns:
        Responses, traces, certificates and counts, in the order of the prompts.

    Raises:
        InvalidArgument: an argument is wrong; raised before any forward pass.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
        DecodingError: a prompt failed on the way; its `finished` holds the responses that were
            complete, as that of any other exception does which ends the call on the way (no memory
            for a single roll-out, an interrupt, what a callback raised).
    """
    models = {name: options.pop(name) for name in _MODEL_ARGUMENTS if name in options}
    config = DecodeConfig.from_options(config, (*_MODEL_ARGUMENTS, *_RUN_ARGUMENTS), **options)
    decoder = TransferDecoder(baseline, reward, **models)
    return decoder.decode(
        prompts,
        config=config,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )


class TransferDecoder:
    """Models that are loaded once, for many calls of `decode`.

    Args:
        baseline: as for `decode`.
        reward: as for `decode`.
        sft: the SFT model: the prior pi_sft and, for indirect transfer, the trajectory log-ratio.
            Must have the baseline's vocabulary.
        baseline_reward: the reward that the baseline was aligned to (indirect transfer with
            weights="reward_gap" or "published").
        tokenizer: the language models'; None: that in the baseline's own folder.
        reward_tokenizer: the reward's; None: that in its own folder.
        baseline_reward_tokenizer: likewise.
        reward_index: which label of a reward model with several labels is the reward.
        reward_bounds: (lo, hi) between which the reward always lies: for the certificate, and
            candidates that cannot be chosen any more are then not rolled out (their Q is NaN in the
            traces).
        device: where models that are named are put; None: a GPU if there is one.
        dtype: of models that are named, a `torch.dtype` or "auto" (as they were saved).
        speed: what makes decoding cheaper, to be switched off for measuring; None: all of it is on.

    Raises:
        InvalidArgument: an argument is wrong; the message names it.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
    """

    def __init__(
        self,
        baseline: ModelLike,
        reward: ModelLike | RewardFunction,
        *,
        sft: ModelLike | None = None,
        baseline_reward: ModelLike | RewardFunction | None = None,
        tokenizer: TokenizerLike | None = None,
        reward_tokenizer: TokenizerLike | None = None,
        baseline_reward_tokenizer: TokenizerLike | None = None,
        reward_index: int | None = None,
        reward_bounds: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        speed: SpeedOptions | None = None,
    ) -> None:
        check_loading({"reward_index": reward_index, "dtype": dtype, "speed": speed})
        self.speed = SpeedOptions() if speed is None else speed
        self.reward_bounds = check_bounds(reward_bounds)
        rollout_id = place_models(device)
        self.baseline = load_language_model(baseline, "baseline", device=rollout_id, dtype=dtype)
        self.tokenizer = load_tokenizer(tokenizer, baseline, "tokenizer")
        self.sft = None
        if sft is not None:
            self.sft = load_language_model(sft, "sft", device=rollout_id, dtype=dtype)
            own = load_tokenizer(None, sft, "sft")
            check_same_vocabulary(self.tokenizer, own, self.baseline, self.sft)
        loading = {
            "texts": Texts(self.tokenizer),
            "vocab_size": self.baseline.get_output_embeddings().weight.shape[0],
            "device": rollout_id,
            "dtype": dtype,
        }
        self.reward = load_reward(
            reward, "reward", tokenizer=reward_tokenizer, label=reward_index, **loading
        )
        self.baseline_reward = None
        if baseline_reward is not None:
            self.baseline_reward = load_reward(
                baseline_reward,
                "baseline_reward",
                tokenizer=baseline_reward_tokenizer,
                label=None,
                **loading,
            )

    # Not inference_mode: its tensors could not be used in training afterwards.
    @torch.no_grad()
    def decode(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        config: DecodeConfig | None = None,
        batch_size: int = 8,
        memory_budget: int | None = None,
        progress: bool = False,
        on_token: Callable[[int], None] | None = None,
        on_finished: Callable[[int, PromptResult], None] | None = None,
        **options: Any,
    ) -> DecodeResult:
        """Decode `prompts`; arguments, result and errors are those of `tq_fast.decode`.

        `on_token(idx)` is called after every new token of prompt `idx`, `on_finished(idx, result)`
        as soon as its response is complete. What they raise ends the call.
        """
        callbacks = {"on_token": on_token, "on_finished": on_finished}
        config = DecodeConfig.from_options(config, (*_RUN_ARGUMENTS, *callbacks), **options)
        check_sizes(batch_size, memory_budget)
        for name, callback in callbacks.items():
            if callback is not None and not callable(callback):
                raise InvalidArgument(f"{name} must be a function or None, got {callback!r}")
        prior = self._check_config(config)
        read = self._read_prompts(prompts, config)
        eos = config.eos_token_id
        if eos is None:
            eos = end_token_ids(self.baseline, self.tokenizer)
        stats = DecodeStats()
        responses = [Response(idx, prompt) for idx, prompt in enumerate(read)]
        batch_size = min(batch_size, max(1, len(read)))
        size = BatchShape(batch_size, batch_size * rows_per_slot(config))
        if read and memory_budget is not None:
            needs = memory_per_prompt(self._models(), read, config)
            size = fit_forest(needs, batch_size=batch_size, memory_budget=memory_budget)
        finished: dict[int, PromptResult] = {}

        def record(response: Response, is_finished: bool) -> None:
            idx = response.idx
            unused = config.max_new_tokens - len(response.token_ids) if is_finished else 0
            bar.advance(1 + unused)
            if on_token is not None:
                on_token(idx)
            if is_finished:
                finished[idx] = self._finish(response, config, prior)
                if on_finished is not None:
                    on_finished(idx, finished[idx])

        num_tokens = len(read) * config.max_new_tokens
        rewards = (getattr(r, "model", None) for r in (self.reward, self.baseline_reward))
        models = [m for m in (self.baseline, self.sft, *rewards) if m is not None]
        plan = DecodePlan(config, prior, eos, self.reward_bounds, size.max_rows, self.speed)
        with (
            TokenBar(num_tokens, visible=progress) as bar,
            evaluating(models),
            carry_finished(finished),
        ):
            self._decode_all(responses, plan, size, stats, record)
        traces = [response.trace for response in responses]
        warn_of_noise(traces, config)
        warn_of_collapse(traces, config)
        results = [finished[response.idx] for response in responses]
        return DecodeResult.collect(results, stats, has_texts=self.tokenizer is not None)

    def prompt_reader(self) -> PromptReader:
        """Reads prompts one at a time into what `decode` takes.

        For prompts that are to be decoded in several calls with the random streams of one.
        """
        return PromptReader(self.tokenizer, vocab_size=self._vocab_size())

    def _decode_all(
        self,
        responses: list[Response],
        plan: DecodePlan,
        size: BatchShape,
        stats: DecodeStats,
        record: Callable[[Response, bool], None],
    ) -> None:
        """Decode everything, over smaller forests where the memory does not suffice."""
        while unfinished := [r for r in responses if not self._is_finished(r, plan)]:
            # Roll-outs to the end get shorter from step to step: prompts that began together stay
            # together, or each step is as long as that of the newest.
            refills = plan.speed.refill_slots and plan.config.horizon is not None
            group = unfinished if refills else unfinished[: size.num_slots]
            try:
                self._decode_group(group, plan, size, stats, record)
            except torch.OutOfMemoryError as error:
                size = smaller_after(error, size)
                plan = dataclasses.replace(plan, max_rows=size.max_rows)

    def _is_finished(self, response: Response, plan: DecodePlan) -> bool:
        ids = response.token_ids
        return len(ids) == plan.config.max_new_tokens or bool(ids and ids[-1] in plan.eos)

    def _decode_group(
        self,
        group: list[Response],
        plan: DecodePlan,
        size: BatchShape,
        stats: DecodeStats,
        record: Callable[[Response, bool], None],
    ) -> None:
        """Decode prompts over one forest a model, as many at a time as `size` says."""
        active, waiting = group[: size.num_slots], group[size.num_slots :]
        roles = open_roles(self._models(), active, waiting, plan)
        own = DecodeStats()
        try:
            DecodeLoop(roles, active, waiting, plan, stats=own).run(record)
        finally:
            for role, part in roles.by_role.items():
                own.token_forwards[role] = part.num_token_forwards
                own.peak_kv_bytes[role] = part.peak_kv_bytes
            stats.add(own)

    def _models(self) -> Models:
        return Models(self.baseline, self.sft, self.reward, self.baseline_reward)

    def _check_config(self, config: DecodeConfig) -> str:
        """Check what depends on the models; return the prior in use."""
        if config.candidates_from == "sft" and self.sft is None:
            raise InvalidArgument("candidates_from='sft' needs an sft model, got sft=None")
        if config.prior == "sft" and self.sft is None:
            raise InvalidArgument("prior='sft' needs an sft model, got sft=None")
        if config.needs_log_ratio and self.sft is None:
            raise InvalidArgument("weights='log_ratio' needs an sft model, got sft=None")
        if config.needs_baseline_reward and self.baseline_reward is None:
            raise InvalidArgument(f"weights={config.weights!r} needs baseline_reward, got None")
        vocab_size = self._vocab_size()
        if config.k > vocab_size:
            raise InvalidArgument(f"k must be at most the vocabulary, {vocab_size}, got {config.k}")
        for token in config.eos_token_id or ():
            if token >= vocab_size:
                raise InvalidArgument(
                    f"eos_token_id must be inside of the vocabulary [0, {vocab_size}), got {token}"
                )
        return config.prior or ("baseline" if self.sft is None else "sft")

    def _read_prompts(self, prompts: Any, config: DecodeConfig) -> list[Prompt]:
        read = read_prompts(prompts, self.tokenizer, vocab_size=self._vocab_size())
        for idx, prompt in enumerate(read):
            self.check_length(idx, prompt, config)
        return read

    def check_length(self, idx: int, prompt: Prompt, config: DecodeConfig) -> None:
        """Refuse a prompt that is too long for a model; `decode` does this by itself.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, its length and what is allowed.
        """
        num_new = config.max_new_tokens + (config.horizon or 0)
        settings = f"max_new_tokens={config.max_new_tokens} and horizon={config.horizon}"
        models = {"baseline": self.baseline, "sft": self.sft, "reward": self.reward}
        if config.needs_baseline_reward:
            models["baseline_reward"] = self.baseline_reward
        check_fits(idx, prompt, num_new, settings, models)

    def _vocab_size(self) -> int:
        models = [model for model in (self.baseline, self.sft) if model is not None]
        return min(model.get_output_embeddings().weight.shape[0] for model in models)

    def _finish(self, response: Response, config: DecodeConfig, prior: str) -> PromptResult:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        sequence = torch.tensor(response.token_ids)
        certificate = self._certify(response, config, prior)
        return PromptResult(text, sequence, response.trace, certificate)

    def _certify(self, response: Response, config: DecodeConfig, prior: str) -> Certificate:
        trace = response.trace
        return certify(
            config,
            prior=prior,
            num_steps=len(trace),
            kl_to_sft=None if self.sft is None else sum(step.kl_to_sft for step in trace),
            kl_to_baseline=sum(step.kl_to_baseline for step in trace),
            kl_baseline_to_sft=None
            if self.sft is None
            else sum(step.kl_baseline_to_sft for step in trace),
            log_prior_mass=sum(float(step.prior_logprobs.logsumexp(-1)) for step in trace),
            ess=[] if config.is_published else known_ess(trace),
            is_exact=all(step.is_complete for step in trace),
            reward_bounds=self.reward_bounds,
        )
