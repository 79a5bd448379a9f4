"""The work that all methods share: models by role, prompts, batches, progress and results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypedDict

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedTokenizerBase

from .config import DecodeConfig, DecodeOptions, Role, SpeedOptions
from .device_times import timing_on
from .errors import InvalidArgument
from .forest.language import device_of
from .forest.store import ForestStore
from .models.generation import warn_of_ignored
from .models.loading import (
    ModelLike,
    TokenizerLike,
    check_same_vocabulary,
    end_token_ids,
    load_language_model,
    load_reward,
    load_tokenizer,
    num_token_ids,
)
from .models.options import LoadingOptions, place_models
from .models.served import (
    LanguageModel,
    ServedModel,
    is_local,
    position_limit,
    vocabulary_size,
)
from .models.shared_weights import Loader
from .prompts import Prompt, PromptLike, PromptReader, read_prompts, repeat_prompts
from .prompts.chats import TemplateOptions
from .results import DecodeResult, DecodeStats, PromptResult, Response, carry_finished
from .rewards.base import Reward, RewardFunction, Texts
from .rewards.lengths import check_room
from .rewards.options import RewardOptions
from .rollouts.stopping import StopStrings
from .servers import Server
from .streaming import ChosenToken, TextPieces, TokenStream, read_to_end, resume_within
from .transfer.budget import BatchShape, MemoryPerPrompt, check_sizes, fit_forest, smaller_after


class RunOptions(TypedDict, total=False):
    """Options of how a call runs; results do not depend on them."""

    batch_size: int
    memory_budget: int | None
    progress: bool


class MethodOptions(DecodeOptions, RunOptions, total=False):
    """The keyword arguments of every preset, beside prompts and models."""

    config: DecodeConfig | None
    template_options: TemplateOptions | None
    baseline_reward: ModelLike | RewardFunction | None
    tokenizer: TokenizerLike | None
    reward_tokenizer: TokenizerLike | None
    baseline_reward_tokenizer: TokenizerLike | None
    reward_index: int | None
    reward_bounds: tuple[float, float] | None
    reward_options: RewardOptions | None
    device: torch.device | str | Mapping[str, torch.device | str] | None
    dtype: torch.dtype | str
    speed: SpeedOptions | None
    model_kwargs: Mapping[str, Mapping[str, Any]] | None


@contextlib.contextmanager
def neutral_torch() -> Iterator[None]:
    """Within the block torch computes as if the caller had set nothing for this thread.

    The caller's default dtype stays, since it is common to all threads: every tensor of the package
    names its dtype.
    """
    with contextlib.ExitStack() as settings:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            # Tensors that are made in inference mode can take no part in training afterwards.
            settings.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        yield


class Report:
    """The progress of a run as its method reports it, and the results that are finished.

    Args:
        bar: the progress bar, which counts tokens.
        finished: the results so far, by prompt position; new ones are added here.
        on_token: called after every new token of a prompt, with the prompt's position.
        on_finished: called as soon as a response is complete, with the prompt's position.
    """

    def __init__(
        self,
        bar: TokenBar,
        finished: dict[int, PromptResult],
        on_token: Callable[[int], None] | None,
        on_finished: Callable[[int, PromptResult], None] | None,
    ) -> None:
        self.bar = bar
        self._finished = finished
        self._on_token = on_token
        self._on_finished = on_finished

    def token(self, idx: int) -> None:
        """Count one more token of prompt `idx`."""
        self.bar.advance(1)
        if self._on_token is not None:
            self._on_token(idx)

    def finish(self, idx: int, result: PromptResult, *, num_unused: int) -> None:
        """Keep the result of prompt `idx`, which left `num_unused` of its tokens undrawn."""
        self.bar.advance(num_unused)
        self._finished[idx] = result
        if self._on_finished is not None:
            self._on_finished(idx, result)


class Method(Protocol):
    """One way to decode prompts over the models of a session.

    Attributes:
        config: how to decode.
        rows_per_prompt: rows of the forest that a prompt takes.
        tokens_per_prompt: tokens that a prompt is counted as, in the progress bar.
        num_new: tokens that may come after a prompt in some model, at most.
        room: the settings that `num_new` comes from, for messages.
    """

    config: DecodeConfig
    rows_per_prompt: int
    tokens_per_prompt: int
    num_new: int
    room: str

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a row, for the longest of `prompts`."""
        ...

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> Iterator[ChosenToken]:
        """Decode the first of `responses`, as many as `shape` allows, or more in turn.

        Yields every token that stays, once it is settled and reported.
        """
        ...

    def conclude(self, result: DecodeResult) -> None:
        """Warn of what the whole result shows."""
        ...


class Session:
    """Models that are loaded once, by role.

    Args:
        languages: language models by role; one that is None takes no part. The first one's
            tokenizer reads the prompts.
        rewards: rewards by role ("reward", "baseline_reward"); one that is None takes no part.
        loading: options for loading both.

    Attributes:
        forests: where the forests of every decode come from, and stay on a GPU.
        vocab_size: number of ids that every language model embeds and predicts.
        num_tokens: number of ids that may be chosen. Models have embeddings for more than their
            tokenizer has tokens, so that sizes are round, and one of two models may know a token
            that the other does not.

    Raises:
        InvalidArgument: an argument is wrong; the message names it.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
    """

    @neutral_torch()
    def __init__(
        self,
        languages: Mapping[Role, ModelLike | None],
        rewards: Mapping[str, ModelLike | RewardFunction | None],
        loading: LoadingOptions,
    ) -> None:
        self.reward_bounds = loading.reward_bounds
        self.speed = loading.speed or SpeedOptions()
        self.forests = ForestStore()
        dtype = loading.dtype
        given = {role: model for role, model in languages.items() if model is not None}
        sources: dict[str, Any] = {str(role): model for role, model in given.items()}
        sources |= {role: reward for role, reward in rewards.items() if reward is not None}
        places = {role: place_models(loading.device, role) for role in sources}
        model_kwargs = loading.model_kwargs or {}
        for role in model_kwargs:
            if role in sources and not isinstance(sources[role], (str, os.PathLike)):
                raise InvalidArgument(
                    f"model_kwargs of {role} cannot be honoured: {role} is loaded already"
                )
        loader = Loader(sources, devices=places, dtype=dtype, model_kwargs=model_kwargs)
        self.languages = _load_languages(given, places, loading, loader)
        warn_of_ignored({role: m for role, m in self.languages.items() if is_local(m)})
        first = next(iter(given))
        self.tokenizer: PreTrainedTokenizerBase | None = self._load_tokenizer(
            loading.tokenizer, given, first, loader, "tokenizer"
        )
        tokenizers = [self.tokenizer]
        for role in [role for role in given if role != first]:
            other = self._load_tokenizer(None, given, role, loader, role)
            check_same_vocabulary(
                role,
                (self.tokenizer, other),
                (self.languages[first], self.languages[role]),
                is_given=loading.tokenizer is not None,
            )
            tokenizers.append(other)
        sizes = [vocabulary_size(model) for model in self.languages.values()]
        known = [num_token_ids(tokenizer) for tokenizer in tokenizers if tokenizer is not None]
        self.vocab_size = min(sizes)
        # Prompts may have any id that all models embed; what is chosen is a token to everybody.
        self.num_tokens = min([*sizes, *known])
        is_one_reward = (
            {"reward", "baseline_reward"} <= set(sources)
            and _is_same(sources["reward"], sources["baseline_reward"])
            and _is_same(loading.reward_tokenizer, loading.baseline_reward_tokenizer)
            and loader.options_of("reward") == loader.options_of("baseline_reward")
            and places["reward"] == places["baseline_reward"]
            # These are of the target reward alone.
            and loading.reward_index is None
            and loading.reward_options is None
        )
        self.rewards: dict[str, Reward] = {
            role: load_reward(
                reward,
                role,
                tokenizer=getattr(loading, f"{role}_tokenizer"),
                label=loading.reward_index if role == "reward" else None,
                options=loading.reward_options if role == "reward" else None,
                texts=Texts(self.tokenizer),
                vocab_size=sizes[0],
                device=places[role],
                dtype=dtype,
                loader=loader,
            )
            for role, reward in rewards.items()
            if reward is not None and (role == "reward" or not is_one_reward)
        }
        if is_one_reward:
            self.rewards["baseline_reward"] = self.rewards["reward"]

    def _load_tokenizer(
        self,
        source: TokenizerLike | None,
        given: Mapping[Role, ModelLike],
        role: Role,
        loader: Loader,
        name: str,
    ) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer `source`, else the model's; `name` is for messages."""
        model = self.languages[role]
        if source is None and isinstance(model, ServedModel):
            return model.tokenizer
        beside = None if isinstance(model, ServedModel) else given[role]
        return load_tokenizer(source, beside, name, loader.options_of(role))

    def prompt_reader(self, template_options: TemplateOptions | None = None) -> PromptReader:
        """Return a reader of one prompt at a time, with the random streams of a single call."""
        return PromptReader(
            self.tokenizer, vocab_size=self.vocab_size, template_options=template_options
        )

    def read(self, prompts: Any, template_options: TemplateOptions | None = None) -> list[Prompt]:
        """Read `prompts` in any of the forms that `tq_fast.prompts.read_prompts` lists."""
        return read_prompts(
            prompts,
            self.tokenizer,
            vocab_size=self.vocab_size,
            template_options=template_options,
        )

    def check_fits(self, idx: int, prompt: Prompt, num_new: int, settings: str) -> None:
        """Refuse a prompt that is too long, with `num_new` tokens after it, for some model.

        Rewards refuse what they cannot render, too, and warn of what they cannot read exactly.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, its length and what is allowed.
        """
        num_prompt = len(prompt.token_ids)
        for role, model in self.languages.items():
            limit = position_limit(model)
            check_room(idx, num_prompt, num_new, settings, role=role, limit=limit)
        for name, reward in self.rewards.items():
            reward.check_prompt(idx, prompt, num_new, settings, role=name)

    def modules(self) -> list[torch.nn.Module]:
        """Return the models of all roles that are in this process."""
        rewards = [reward.model for reward in self.rewards.values()]
        every = (*self.languages.values(), *rewards)
        return [model for model in every if isinstance(model, torch.nn.Module)]

    def end_ids(self, config: DecodeConfig) -> tuple[int, ...]:
        """Return the ids that end a response: the config's, else the first model's own.

        Raises:
            InvalidArgument: an id of the config is outside of the vocabulary.
        """
        if config.end_ids is None:
            return end_token_ids(next(iter(self.languages.values())), self.tokenizer)
        for token in config.end_ids:
            if token >= self.vocab_size:
                raise InvalidArgument(
                    "eos_token_id must be inside of the vocabulary "
                    f"[0, {self.vocab_size}), got {token}"
                )
        return config.end_ids

    def stop_strings(self, config: DecodeConfig) -> StopStrings:
        """Return what ends a response beside an EOS.

        Raises:
            InvalidArgument: there is no tokenizer, and so no text to look for a string in.
        """
        if config.stop_strings and self.tokenizer is None:
            raise InvalidArgument(
                f"stop={config.stop!r} is looked for in text, but the baseline came without a "
                "tokenizer; pass tokenizer="
            )
        return StopStrings(config.stop_strings, self.tokenizer)

    def text_of(self, token_ids: Sequence[int], config: DecodeConfig) -> str | None:
        """Return a response as text, which ends before a stop string; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        stop = self.stop_strings(config)
        return stop.text(token_ids, skip_special_tokens=config.skip_special_tokens)

    # torch.inference_mode would serve too, but its tensors cannot be used in training afterwards.
    @neutral_torch()
    @torch.no_grad()
    def decode(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        method: Method,
        *,
        template_options: TemplateOptions | None = None,
        **running: Any,
    ) -> DecodeResult:
        """Decode prompts of any form by `method`.

        Args:
            prompts: as for `tq_fast.decode`.
            method: one of this session's.
            template_options: as for `tq_fast.decode`.
            **running: the keyword arguments of `run`.

        Raises:
            InvalidArgument: an argument is wrong; raised before any forward pass.
            DecodingError: a prompt failed; `finished` holds the complete responses.
        """
        read = self.read(prompts, template_options)
        for idx, prompt in enumerate(read):
            self.check_fits(idx, prompt, method.num_new, method.room)
        repeated = repeat_prompts(read, method.config.num_return_sequences)
        result = self.run(repeated, method, **running)
        method.conclude(result)
        return result

    def stream(
        self,
        prompt: PromptLike,
        method: Method,
        *,
        template_options: TemplateOptions | None = None,
        memory_budget: int | None = None,
    ) -> TokenStream:
        """Return the tokens of one prompt, each once `method` has settled it.

        Raises:
            InvalidArgument: an argument is wrong, or there are several prompts or responses.
        """
        config = method.config
        if config.num_return_sequences != 1:
            raise InvalidArgument(
                "num_return_sequences must be 1 in a stream, which has the tokens of one response, "
                f"got {config.num_return_sequences}"
            )
        read = self.read(prompt, template_options)
        if len(read) != 1:
            raise InvalidArgument(f"prompt must be one prompt in a stream, got {len(read)}")
        self.check_fits(0, read[0], method.num_new, method.room)
        check_sizes(1, memory_budget)
        pieces = None
        if self.tokenizer is not None:
            stop = self.stop_strings(config)
            pieces = TextPieces(stop, skip_special_tokens=config.skip_special_tokens)
        gpus = gpus_of(self.modules())

        @contextlib.contextmanager
        def as_in_decode() -> Iterator[None]:
            with neutral_torch(), torch.no_grad(), timing_on(gpus):
                yield

        tokens = self._stream(read[0], method, memory_budget)
        return TokenStream(resume_within(as_in_decode, tokens), pieces)

    def _stream(
        self, prompt: Prompt, method: Method, memory_budget: int | None
    ) -> Generator[ChosenToken, None, DecodeResult]:
        result = yield from self._tokens([prompt], method, memory_budget=memory_budget)
        method.conclude(result)
        return result

    def run(self, prompts: Sequence[Prompt], method: Method, **running: Any) -> DecodeResult:
        """Decode `prompts` by `method`, in smaller batches where the memory does not suffice.

        Args:
            prompts: as `read` returns them.
            method: one of this session's.
            **running: batch_size, memory_budget, progress, on_token and on_finished, as for
                `TransferDecoder.decode`.

        An exception that ends the run carries the complete responses as its `finished`.
        """
        with timing_on(gpus_of(self.modules())):
            return read_to_end(self._tokens(prompts, method, **running))

    def _tokens(
        self,
        prompts: Sequence[Prompt],
        method: Method,
        *,
        batch_size: int = 8,
        memory_budget: int | None = None,
        progress: bool = False,
        on_token: Callable[[int], None] | None = None,
        on_finished: Callable[[int, PromptResult], None] | None = None,
    ) -> Generator[ChosenToken, None, DecodeResult]:
        """Decode `prompts`; yield every token, and return the result."""
        check_sizes(batch_size, memory_budget)
        responses = [Response(idx, prompt) for idx, prompt in enumerate(prompts)]
        batch_size = min(batch_size, max(1, len(prompts)))
        shape = BatchShape(batch_size, batch_size * method.rows_per_prompt)
        if prompts and memory_budget is not None:
            needed = method.memory(prompts)
            shape = fit_forest(needed, batch_size=batch_size, memory_budget=memory_budget)
        stats = DecodeStats()
        finished: dict[int, PromptResult] = {}
        num_tokens = len(prompts) * method.tokens_per_prompt
        with TokenBar(num_tokens, visible=progress) as bar, carry_finished(finished):
            report = Report(bar, finished, on_token, on_finished)
            while unfinished := [r for r in responses if r.idx not in finished]:
                try:
                    yield from method.decode(unfinished, shape, stats, report)
                except BaseException as error:
                    # They are too large, or numbers that are not finite lie in their buffers.
                    self.forests = ForestStore()
                    if not isinstance(error, torch.OutOfMemoryError):
                        raise
                    shape = smaller_after(error, shape)
            stats.settle()
        results = [finished[idx] for idx in range(len(prompts))]
        return DecodeResult.collect(results, stats, prompts=prompts, tokenizer=self.tokenizer)


def _load_languages(
    given: Mapping[Role, ModelLike],
    places: Mapping[str, torch.device],
    loading: LoadingOptions,
    loader: Loader,
) -> dict[Role, LanguageModel]:
    """Return the language models by role; a server that is named twice is opened once."""
    languages: dict[Role, LanguageModel] = {}
    served: dict[Server, ServedModel] = {}
    for role, model in given.items():
        server = Server.named(model, loader.options_of(role))
        if server is None:
            languages[role] = load_language_model(
                model, role, device=places[role], dtype=loading.dtype, loader=loader
            )
            continue
        if server not in served:
            served[server] = ServedModel(server, role, loading.tokenizer)
        languages[role] = served[server]
    return languages


def gpus_of(modules: Sequence[torch.nn.Module]) -> list[torch.device]:
    """Return the GPUs on which `modules` compute, each once."""
    places = {device_of(module) for module in modules}
    places |= {weight.device for module in modules for weight in module.parameters()}
    return sorted((gpu for gpu in places if gpu.type == "cuda"), key=str)


def _is_same(first: Any, second: Any) -> bool:
    """Whether two arguments are one object, or one name."""
    return first is second or (isinstance(first, (str, os.PathLike)) and first == second)


class TokenBar:
    """A context manager with a progress bar over `num_tokens` tokens, shown where `visible`."""

    def __init__(self, num_tokens: int, *, visible: bool) -> None:
        self._bar = Progress(
            TextColumn("decoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not visible,
        )
        self._task = self._bar.add_task("decoding", total=num_tokens)

    def __enter__(self) -> TokenBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def num_done(self) -> int:
        """The number of tokens counted so far."""
        return int(self._bar.tasks[0].completed)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens."""
        self._bar.update(self._task, advance=num_tokens)
