"""What a session asks of a method, what the method reports, and the options of every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch

from ..config import DecodeConfig, DecodeOptions, SpeedOptions
from ..models.loading import ModelLike, TokenizerLike
from ..prompts import Prompt
from ..prompts.chats import TemplateOptions
from ..results import DecodeResult, DecodeStats, PromptResult, Response
from ..rewards.base import RewardFunction
from ..rewards.options import RewardOptions
from ..streaming import ChosenToken
from ..transfer.budget import BatchShape, MemoryPerPrompt
from .progress import TokenBar


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
