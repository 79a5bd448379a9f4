"""`decode` and `TransferDecoder`: Transfer Q* over models that the caller brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DecodeConfig, DecodeOptions, Role, SpeedOptions
from .engines.remote import rollout_law
from .errors import InvalidArgument
from .models.loading import ModelLike, TokenizerLike
from .models.options import LoadingOptions
from .models.served import LanguageModel, ServedModel
from .prompts import Prompt, PromptLike, PromptReader
from .prompts.chats import TemplateOptions, check_template_options
from .results import DecodeResult, DecodeStats, PromptResult, Response
from .rewards.base import Reward, RewardFunction
from .rewards.options import RewardOptions
from .servers import LanguageServer
from .session import Session
from .session.method import Report
from .streaming import ChosenToken, TokenStream
from .transfer.budget import BatchShape, MemoryPerPrompt, check_sizes
from .transfer.certificate import certify
from .transfer.loop import DecodeLoop
from .transfer.roles import DecodePlan, memory_per_prompt, open_roles, rows_per_prompt
from .transfer.warnings import warn_of_collapse, warn_of_noise

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RUN_ARGUMENTS = ("config", "template_options", "batch_size", "memory_budget", "progress")


def decode(
    prompts: PromptLike | Sequence[PromptLike],
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
    reward_options: RewardOptions | None = None,
    device: torch.device | str | Mapping[str, torch.device | str] | None = None,
    dtype: torch.dtype | str = "auto",
    speed: SpeedOptions | None = None,
    model_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    config: DecodeConfig | None = None,
    template_options: TemplateOptions | None = None,
    batch_size: int = 8,
    memory_budget: int | None = None,
    progress: bool = False,
    **options: Unpack[DecodeOptions],
) -> DecodeResult:
    """Decode `prompts` with Transfer Q* (arXiv 2405.20495, Algorithm 1).

    Equals, for each new token: take the k likeliest next tokens, complete each with `baseline`,
    score the whole texts with `reward`, and sample from `softmax(log pi_prior + Q / alpha)`.

    Args:
        prompts: text, chat messages or token ids, a list or a column of these, or what a tokenizer
            returned. A last turn of the assistant's goes on.
        baseline: the aligned model that rolls out: a hub id, a local folder or a loaded model.
        reward: a sequence classifier (hub id, folder or model; any tokenizer), a function
            `(prompts, responses) -> floats`, or another kind that `tq_fast.rewards.base` lists.
        config: settings to start from; `options` replace its fields.
        template_options: what chat templates get beside messages: tools, enable_thinking, ...
        batch_size: prompts decoded together, at most; on a GPU it may change rounding, no more.
        memory_budget: most bytes of KV and logits, over all models; the rest waits its turn.
        progress: show a progress bar.
        **options: every field of `DecodeConfig`.

    All other keyword arguments are those of `TransferDecoder`.

    Returns:
        Responses, traces, certificates and counts by prompt, `num_return_sequences` of each in a
        row; errors and callbacks count as that list does.

    Raises:
        InvalidArgument: an argument is wrong; raised before any forward pass.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
        DecodingError: one prompt failed; `finished` holds the complete responses, as on any other
            exception that ends the call midway.
    """
    loading: dict[str, Any] = {
        "tokenizer": tokenizer,
        "reward_tokenizer": reward_tokenizer,
        "baseline_reward_tokenizer": baseline_reward_tokenizer,
        "reward_index": reward_index,
        "reward_bounds": reward_bounds,
        "reward_options": reward_options,
        "device": device,
        "dtype": dtype,
        "speed": speed,
        "model_kwargs": model_kwargs,
    }
    others = ("sft", "baseline_reward", *loading, *_RUN_ARGUMENTS)
    # Wrong settings are refused before any model is loaded.
    config = DecodeConfig.from_options(config, others, **options)
    check_template_options(template_options)
    check_sizes(batch_size, memory_budget)
    decoder = TransferDecoder(baseline, reward, sft=sft, baseline_reward=baseline_reward, **loading)
    return decoder.decode(
        prompts,
        config=config,
        template_options=template_options,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )


class TransferDecoder:
    """Models that are loaded once, for many calls of `decode`.

    Args:
        baseline: as for `decode`. An adapter folder, a PeftModel and a compiled model are taken
            too, here and for the other models. Models that are named alike are loaded once, and
            share their weights with the adapters on top of them. A model object that is given
            both by itself and inside of a PeftModel is, by itself, the base with its adapters off;
            any other object runs with adapters as it says.
        reward: as for `decode`.
        sft: the SFT model: the prior pi_sft and, for indirect transfer, the trajectory log-ratio.
            Must have the baseline's vocabulary, but for added tokens. Where it is the baseline's
            own model, the two are run once and counted as the baseline.
        baseline_reward: the reward that the baseline was aligned to (indirect transfer with
            weights="reward_gap" or "published").
        tokenizer: tokenizer of the language models; None: the one in the baseline's folder. An SFT
            model that has none beside it is taken to have the one given here.
        reward_tokenizer: tokenizer of the reward; None: the one in its own folder.
        baseline_reward_tokenizer: the same for `baseline_reward`.
        reward_index: which label of a reward model with several labels is the reward.
        reward_bounds: (lo, hi) between which the reward always lies. The certificate's bound needs
            them, and with them candidates that can no longer be chosen are not rolled out (their Q
            is NaN in the traces).
        reward_options: how the reward reads prompts and responses: pairs, truncation, special
            tokens; None: one text, refused where it is too long.
        device: where models given by name are put, one device or a dict of them by role; None: a
            GPU if there is one.
        dtype: dtype of models given by name, a `torch.dtype` or "auto" (as they were saved).
        speed: the speed options, each of which can be switched off to measure it; None: all on.
        model_kwargs: more keyword arguments of `from_pretrained` by role ("baseline", "sft",
            "reward", "baseline_reward"), such as quantization_config, device_map, gguf_file,
            revision or trust_remote_code. With device_map or quantization_config `device` is not
            applied.

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
        reward_options: RewardOptions | None = None,
        device: torch.device | str | Mapping[str, torch.device | str] | None = None,
        dtype: torch.dtype | str = "auto",
        speed: SpeedOptions | None = None,
        model_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        loading = LoadingOptions(
            tokenizer=tokenizer,
            reward_tokenizer=reward_tokenizer,
            baseline_reward_tokenizer=baseline_reward_tokenizer,
            reward_index=reward_index,
            reward_bounds=reward_bounds,
            reward_options=reward_options,
            device=device,
            dtype=dtype,
            speed=speed,
            model_kwargs=model_kwargs,
        )
        self.session = Session(
            {"baseline": baseline, "sft": sft},
            {"reward": reward, "baseline_reward": baseline_reward},
            loading,
        )

    @property
    def baseline(self) -> LanguageModel:
        """The model that rolls out."""
        return self.session.languages["baseline"]

    @property
    def sft(self) -> LanguageModel | None:
        """The SFT model, where there is one."""
        return self.session.languages.get("sft")

    @property
    def reward(self) -> Reward:
        """The target reward."""
        return self.session.rewards["reward"]

    @property
    def baseline_reward(self) -> Reward | None:
        """The reward that the baseline was aligned to, where it was given."""
        return self.session.rewards.get("baseline_reward")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The language models' tokenizer, where there is one."""
        return self.session.tokenizer

    def decode(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        config: DecodeConfig | None = None,
        template_options: TemplateOptions | None = None,
        batch_size: int = 8,
        memory_budget: int | None = None,
        progress: bool = False,
        on_token: Callable[[int], None] | None = None,
        on_finished: Callable[[int, PromptResult], None] | None = None,
        **options: Unpack[DecodeOptions],
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
        return self.session.decode(
            prompts,
            TransferMethod(self.session, config),
            template_options=template_options,
            batch_size=batch_size,
            memory_budget=memory_budget,
            progress=progress,
            on_token=on_token,
            on_finished=on_finished,
        )

    def stream(
        self,
        prompt: PromptLike,
        *,
        config: DecodeConfig | None = None,
        template_options: TemplateOptions | None = None,
        memory_budget: int | None = None,
        **options: Unpack[DecodeOptions],
    ) -> TokenStream:
        """Decode one prompt, and return an iterator over its tokens, each as soon as it is chosen.

        Tokens are those of `decode`, whose arguments and errors these are; what is wrong with them
        is raised here, before the first token. `result` of the stream is there at its end. Leave
        the loop whenever you like: nothing goes on in the background.
        """
        names = ("config", "template_options", "memory_budget")
        config = DecodeConfig.from_options(config, names, **options)
        return self.session.stream(
            prompt,
            TransferMethod(self.session, config),
            template_options=template_options,
            memory_budget=memory_budget,
        )

    def prompt_reader(self, template_options: TemplateOptions | None = None) -> PromptReader:
        """Return a reader that turns one prompt at a time into the form that `decode` takes.

        Use it to decode prompts in several calls with the random streams of a single one.
        `template_options` are those of `decode`.
        """
        return self.session.prompt_reader(template_options)


class TransferMethod:
    """Transfer Q* as a session runs it.

    Args:
        session: models and rewards.
        config: settings.
        roller: the role whose model rolls out; with "sft" that model plays every part.
        is_aligned: whether the baseline was aligned to the reward, or to the one that indirect
            transfer makes up for; without it the theorem says nothing under the baseline prior.

    Raises:
        InvalidArgument: the session's models cannot serve the settings.
    """

    def __init__(
        self,
        session: Session,
        config: DecodeConfig,
        *,
        roller: Role = "baseline",
        is_aligned: bool = True,
    ) -> None:
        self.session = session
        self.config = config
        self.is_aligned = is_aligned
        # `max_rows` follows the shape of each batch.
        self.plan = _make_plan(session, config, roller)
        self.languages = self._open_languages()
        self.rows_per_prompt = rows_per_prompt(config)
        self.tokens_per_prompt = config.max_new_tokens
        self.num_new = config.max_new_tokens + (config.horizon or 0)
        self.room = f"max_new_tokens={config.max_new_tokens} and horizon={config.horizon}"

    def _open_languages(self) -> dict[Role, PreTrainedModel | LanguageServer]:
        """The models of the session; those behind a URL are opened for these settings."""
        config, eos = self.config, self.plan.eos
        opened: dict[Role, PreTrainedModel | LanguageServer] = {}
        for role, model in self.session.languages.items():
            if isinstance(model, ServedModel):
                opened[role] = model.open(
                    k=config.k,
                    law=rollout_law(config),
                    end_ids=eos if config.min_new_tokens else (),
                    needs_scores=config.needs_log_ratio
                    and model is self.session.languages.get("sft"),
                )
            else:
                opened[role] = model
        return opened

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        return memory_per_prompt(self.session.languages, self.session.rewards, prompts, self.plan)

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> Iterator[ChosenToken]:
        """Decode over a forest for each model; a finished prompt's slot goes to the next prompt."""
        plan = dataclasses.replace(self.plan, max_rows=shape.max_rows)
        # Roll-outs to the end of the response get shorter from step to step. Slots are not refilled
        # then, because a prompt that starts later would make every step as long as its own.
        refills = plan.speed.refill_slots and plan.config.horizon is not None
        active = responses[: shape.num_prompts]
        waiting = responses[shape.num_prompts :] if refills else []
        roles = open_roles(
            self.languages,
            self.session.rewards,
            [response.prompt for response in active],
            [response.prompt for response in waiting],
            plan,
            self.session.forests,
        )

        own = DecodeStats()
        try:
            for response, is_finished in DecodeLoop(
                roles, active, waiting, plan, stats=own
            ).tokens():
                report.token(response.idx)
                if is_finished:
                    num_unused = self.tokens_per_prompt - len(response.token_ids)
                    report.finish(response.idx, self.finish(response), num_unused=num_unused)
                yield ChosenToken(response.idx, response.trace[-1], is_finished)
        finally:
            for role, part in roles.by_role.items():
                own.token_forwards[role] = part.num_token_forwards
                own.peak_kv_bytes[role] = part.peak_kv_bytes
            stats.add(own)

    def conclude(self, result: DecodeResult) -> None:
        """Warn of roll-outs that are too few."""
        warn_of_noise(result.traces, self.config)
        warn_of_collapse(result.traces, self.config)

    def finish(self, response: Response) -> PromptResult:
        """Return the result of a response that is complete."""
        is_bounded = self.is_aligned or self.plan.prior != "baseline"
        certificate = certify(
            response.trace,
            self.plan.config,
            prior=self.plan.prior,
            reward_bounds=self.session.reward_bounds if is_bounded else None,
        )
        text = self.session.text_of(response.token_ids, self.plan.config)
        return PromptResult(text, torch.tensor(response.token_ids), response.trace, certificate)


def _make_plan(session: Session, config: DecodeConfig, roller: Role) -> DecodePlan:
    """Return the plan of a decode; refuse settings that the session's models cannot serve."""
    has_sft = "sft" in session.languages
    if config.candidates_from == "sft" and not has_sft:
        raise InvalidArgument("candidates_from='sft' needs an sft model, got sft=None")
    if config.prior == "sft" and not has_sft:
        raise InvalidArgument("prior='sft' needs an sft model, got sft=None")
    if config.needs_log_ratio and not has_sft:
        raise InvalidArgument("weights='log_ratio' needs an sft model, got sft=None")
    if config.needs_baseline_reward and "baseline_reward" not in session.rewards:
        raise InvalidArgument(f"weights={config.weights!r} needs baseline_reward, got None")
    eos = session.end_ids(config)
    num_usable = session.num_tokens - (len(set(eos)) if config.min_new_tokens else 0)
    if config.k > num_usable:
        what = "the vocabulary" if num_usable == session.num_tokens else "the tokens but for EOS"
        raise InvalidArgument(f"k must be at most {what}, {num_usable}, got {config.k}")
    return DecodePlan(
        config,
        roller=roller,
        prior=config.prior or ("sft" if has_sft else "baseline"),
        candidates_from=config.candidates_from,
        eos=eos,
        stop=session.stop_strings(config),
        vocab_size=session.vocab_size,
        num_tokens=session.num_tokens,
        reward_bounds=session.reward_bounds,
        max_rows=0,
        speed=session.speed,
    )
