"""Prompts in, records out, as they are finished: a prompt that fails ends no other.

A decoder runs in the process of the job, or in a worker beside others (`tq_fast.ray`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from ..config import DecodeConfig
from ..presets.cost import draws_texts
from ..prompts import Prompt
from ..results import PromptResult
from ..transfer.warnings import count_noisy_steps
from .forecast import Forecast, forecast
from .prompt_file import PromptEntry
from .record_file import Record
from .records import ends_the_job, error_record, response_record
from .resume import ModelChoice, model_settings

# A prompt of a file, and as the models read it.
Reading: TypeAlias = tuple[PromptEntry, Prompt]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How prompts are decoded and what their records hold.

    Attributes:
        batch_size: prompts that are decoded together, at most.
        memory_budget: bytes of KV and logits, at most; None: as much as batch_size takes.
        traces: whether records hold a trace of every step.
        template_options: those of `TransferDecoder.decode`.
    """

    batch_size: int = 8
    memory_budget: int | None = None
    traces: bool = False
    template_options: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The record of one prompt, and what it took.

    Attributes:
        record: a response or an error.
        num_tokens: response tokens.
        num_steps: steps of all responses.
        num_noisy_steps: those whose standard error of Q exceeds alpha.
    """

    record: Record
    num_tokens: int = 0
    num_steps: int = 0
    num_noisy_steps: int = 0

    @property
    def index(self) -> int:
        """The position of the prompt among all."""
        return int(self.record["index"])


class Progress(Protocol):
    """Hears how far a decode is."""

    def work(self, num_tokens: int) -> None:
        """Count tokens that were drawn, or need not be drawn any more.

        In the end there are `Forecast.tokens_per_prompt` of every prompt.
        """
        ...

    def step(self) -> None:
        """Take the time: a forward pass, or a step of all roll-outs, has come to its end."""
        ...

    def token(self, index: int) -> None:
        """Count a new token of the response to the prompt `index`."""
        ...

    def restart(self, indices: Sequence[int]) -> None:
        """Begin these prompts again, whose tokens were counted in vain, as all work under way."""
        ...


class Decoder(Protocol):
    """Decodes the prompts of a job, here or elsewhere."""

    @property
    def config(self) -> DecodeConfig:
        """The settings, with those that the method fixes."""
        ...

    def model_settings(self) -> dict[str, Any]:
        """Return name and fingerprint of each model, by role."""
        ...

    def forecast(self, entries: Sequence[PromptEntry], done: Collection[int]) -> Forecast:
        """Return what the prompts that are not done are going to take."""
        ...

    def run(
        self,
        entries: Sequence[PromptEntry],
        done: Collection[int],
        on_finished: Callable[[Finished], None],
        progress: Progress,
    ) -> None:
        """Decode every prompt that is not done, or make an error record of it.

        Args:
            entries: every prompt of the job, by its index.
            done: indices of those that have a record.
            on_finished: called as soon as a prompt has its record.
            progress: hears what is between records, where the decoder does.

        Raises:
            Exception: an error that every prompt would meet.
        """
        ...


class EntryDecoder:
    """Decodes prompts in this process; the settings are checked, without a forward pass.

    Args:
        models: which method and which models; they are loaded.
        config: settings.
        decoding: how prompts are decoded.

    Raises:
        TqFastError: a setting or a model is wrong.
    """

    def __init__(self, models: ModelChoice, config: DecodeConfig, decoding: Decoding) -> None:
        self.models = models
        self.method = models.load(config)
        self.decoding = decoding
        # A value head can be fitted later to the texts that the best of n was chosen from.
        self.keeps_texts = self.method.name == "best_of_n"
        self._read: tuple[Sequence[PromptEntry], list[Prompt | Exception]] | None = None
        self.method.decode(
            [],
            template_options=decoding.template_options,
            batch_size=decoding.batch_size,
            memory_budget=decoding.memory_budget,
        )

    @property
    def config(self) -> DecodeConfig:
        """The settings, with those that the method fixes."""
        return self.method.config

    def model_settings(self) -> dict[str, Any]:
        """Return name and fingerprint of each model, by role."""
        return model_settings(self.method, self.models)

    def forecast(self, entries: Sequence[PromptEntry], done: Collection[int]) -> Forecast:
        """Return what the prompts that are not done are going to take."""
        read = zip(entries, self._read_once(entries), strict=True)
        pending = [prompt for entry, prompt in read if entry.index not in done]
        return forecast(self.method, [one for one in pending if isinstance(one, Prompt)])

    def run(
        self,
        entries: Sequence[PromptEntry],
        done: Collection[int],
        on_finished: Callable[[Finished], None],
        progress: Progress,
    ) -> None:
        """Decode every prompt that is not done, as `Decoder.run` says."""
        readings: list[Reading] = []
        for entry, read in zip(entries, self._read_once(entries), strict=True):
            if entry.index in done:
                continue
            if isinstance(read, Prompt):
                readings.append((entry, read))
            else:
                on_finished(Finished(error_record(entry, read)))
        self.decode(readings, on_finished, progress)

    def _read_once(self, entries: Sequence[PromptEntry]) -> list[Prompt | Exception]:
        """Read the prompts of the job, or return what the call before made of the same ones."""
        if self._read is None or self._read[0] is not entries:
            self._read = (entries, self.read(entries))
        return self._read[1]

    def read(self, entries: Iterable[PromptEntry]) -> list[Prompt | Exception]:
        """Return every prompt as the models read it, or why it cannot be read.

        All prompts of a job are read in one call, those that are done too: equal ones are counted,
        so that every prompt has the random stream of an uninterrupted run.
        """
        reader = self.method.prompt_reader(self.decoding.template_options)
        read: list[Prompt | Exception] = []
        for entry in entries:
            try:
                prompt = reader.read(entry.index, entry.prompt)
                self.method.check_length(entry.index, prompt)
                read.append(prompt)
            except Exception as error:
                read.append(error)
        return read

    def decode(
        self,
        readings: Sequence[Reading],
        on_finished: Callable[[Finished], None],
        progress: Progress | None = None,
    ) -> None:
        """Decode prompts that were read; the other arguments are those of `Decoder.run`."""
        run = _Run(self, on_finished, progress)
        waiting = list(readings)
        while waiting:
            waiting = run.decode_most(waiting)


class _Run:
    """One call of `EntryDecoder.decode`, whose arguments it has."""

    def __init__(
        self,
        decoder: EntryDecoder,
        on_finished: Callable[[Finished], None],
        progress: Progress | None,
    ) -> None:
        self.decoder = decoder
        self.draws_texts = draws_texts(decoder.method.method)
        self.config = decoder.config
        self.on_finished = on_finished
        self.progress = progress
        self.done: set[int] = set()

    def decode_most(self, waiting: list[Reading]) -> list[Reading]:
        """Decode `waiting`; if a prompt fails, find it and return what was not begun."""
        try:
            self._decode(waiting)
            return []
        except Exception as error:
            left = self._left(waiting)
            if ends_the_job(error) or not left:
                raise
        # The forest takes prompts in order, so that those under way are the first that are left.
        # They run again after the except block, where the error and the memory that its traceback
        # held are gone.
        size = self.decoder.decoding.batch_size
        self._decode_group(left[:size])
        return left[size:]

    def _decode_group(self, group: list[Reading]) -> None:
        """Decode `group` together; if that fails, its halves, down to the prompt that fails."""
        if self.progress is not None:
            self.progress.restart([entry.index for entry, _ in group])
        try:
            self._decode(group)
            return
        except Exception as error:
            left = self._left(group)
            if ends_the_job(error) or not left:
                raise
            if len(group) == 1:
                self._finish(Finished(error_record(group[0][0], error)))
                return
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._decode_group(half)

    def _left(self, readings: Sequence[Reading]) -> list[Reading]:
        return [reading for reading in readings if reading[0].index not in self.done]

    def _decode(self, readings: list[Reading]) -> None:
        num = self.config.num_return_sequences
        results: dict[int, PromptResult] = {}
        progress = self.progress
        # Responses that have a token of the step under way; the next step begins with one of them.
        heard: set[int] = set()

        def hear_token(idx: int) -> None:
            if progress is not None:
                if not heard or idx in heard:
                    heard.clear()
                    progress.step()
                heard.add(idx)
                progress.token(readings[idx // num][0].index)

        def hear_work(num_tokens: int) -> None:
            if progress is not None:
                progress.work(num_tokens)
                if self.draws_texts:
                    progress.step()

        def hear_finished(idx: int, result: PromptResult) -> None:
            results[idx] = result
            # The responses to one prompt stand in a row, and make one record.
            mine = range(idx - idx % num, idx - idx % num + num)
            if all(other in results for other in mine):
                whole = [results.pop(other) for other in mine]
                self._finish(self._finished(readings[idx // num][0], whole))

        self.decoder.method.decode(
            [prompt for _, prompt in readings],
            batch_size=self.decoder.decoding.batch_size,
            memory_budget=self.decoder.decoding.memory_budget,
            on_token=hear_token,
            on_finished=hear_finished,
            on_work=hear_work,
        )

    def _finished(self, entry: PromptEntry, results: Sequence[PromptResult]) -> Finished:
        traces, texts = self.decoder.decoding.traces, self.decoder.keeps_texts
        alpha = self.config.alpha
        return Finished(
            response_record(entry, results, traces=traces, texts=texts),
            num_tokens=sum(len(result.sequence) for result in results),
            num_steps=sum(len(result.trace) for result in results),
            num_noisy_steps=sum(count_noisy_steps(result.trace, alpha) for result in results),
        )

    def _finish(self, finished: Finished) -> None:
        self.on_finished(finished)
        self.done.add(finished.index)
