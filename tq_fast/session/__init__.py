"""The work that all methods share: models by role, prompts, batches, progress and results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import DecodeConfig, Role, SpeedOptions
from ..device_times import timing_on
from ..errors import InvalidArgument
from ..forest.language import device_of
from ..forest.store import ForestStore
from ..models.loading import ModelLike, end_token_ids
from ..models.options import LoadingOptions
from ..models.served import position_limit
from ..prompts import Prompt, PromptLike, PromptReader, read_prompts, repeat_prompts
from ..prompts.chats import TemplateOptions
from ..results import DecodeResult, DecodeStats, PromptResult, Response, carry_finished
from ..rewards.base import RewardFunction
from ..rewards.lengths import check_room
from ..rollouts.stopping import StopStrings
from ..streaming import ChosenToken, TextPieces, TokenStream, read_to_end, resume_within
from ..transfer.budget import BatchShape, check_sizes, fit_forest, smaller_after
from .loading import load_models
from .method import Method, Report
from .progress import TokenBar


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
        loaded = load_models(languages, rewards, loading)
        self.languages = loaded.languages
        self.rewards = loaded.rewards
        self.tokenizer = loaded.tokenizer
        self.vocab_size = loaded.vocab_size
        self.num_tokens = loaded.num_tokens

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
                `TransferDecoder.decode`; and `on_work(num_tokens)`, called wherever the progress
                bar moves, before `on_token` and `on_finished`: of every prompt it counts
                `method.tokens_per_prompt` tokens in the end.

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
        on_work: Callable[[int], None] | None = None,
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
        with TokenBar(num_tokens, progress, on_work) as bar, carry_finished(finished):
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


def gpus_of(modules: Sequence[torch.nn.Module]) -> list[torch.device]:
    """Return the GPUs on which `modules` compute, each once."""
    places = {device_of(module) for module in modules}
    places |= {weight.device for module in modules for weight in module.parameters()}
    return sorted((gpu for gpu in places if gpu.type == "cuda"), key=str)
