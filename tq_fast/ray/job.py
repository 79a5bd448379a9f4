"""The job of `tq-fast decode` in workers of Ray: the same records as in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import queue
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..config import DecodeConfig
from ..errors import TqFastError
from ..jobs.decoding import Decoding, EntryDecoder, Finished, Progress, Reading
from ..jobs.forecast import Forecast
from ..jobs.prompt_file import PromptEntry
from ..jobs.records import error_record
from ..jobs.resume import ModelChoice, model_differences
from ..prompts import Prompt
from .cluster import Cluster, connect, may_use_gpus
from .pool import Group, WorkerLost, WorkerPool

# So many batches go to a worker at once, at most: slots that fall free take the next prompt.
MAX_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Keyed:
    """A prompt, and the key of its random stream, which depends on the prompts before it."""

    entry: PromptEntry
    key: int


@dataclasses.dataclass(frozen=True)
class Description:
    """A worker that has loaded its models: the settings of its method, and what the models are."""

    config: DecodeConfig
    models: dict[str, Any]


class DecodeWorker:
    """Decodes groups of prompts; its process is a worker's.

    Args:
        models: which method and which models; they are loaded.
        config: settings.
        decoding: how prompts are decoded.

    Raises:
        TqFastError: a setting or a model is wrong.
    """

    def __init__(self, models: ModelChoice, config: DecodeConfig, decoding: Decoding) -> None:
        logging.disable_progress_bar()
        self.decoder = EntryDecoder(models, config, decoding)

    def describe(self) -> Description:
        """Return its settings and models."""
        return Description(self.decoder.config, self.decoder.model_settings())

    def keys(self, entries: Sequence[PromptEntry]) -> list[int | Finished]:
        """Return the key of every prompt's random stream, or the error record of the prompt."""
        return [
            read.key if isinstance(read, Prompt) else Finished(error_record(entry, read))
            for entry, read in zip(entries, self.decoder.read(entries), strict=True)
        ]

    def forecast(self, entries: Sequence[PromptEntry], done: Collection[int]) -> Forecast:
        """Return what the prompts that are not done are going to take."""
        return self.decoder.forecast(entries, done)

    def run(
        self, head: None, items: Mapping[int, Keyed]
    ) -> Iterator[tuple[int | None, Finished | str]]:
        """Iterate over the records of `items` as they are finished, by index, and over warnings."""
        yield from _stream(functools.partial(self._decode, items))

    def decode(self, items: Sequence[Keyed], on_finished: Callable[[Finished], None]) -> None:
        """Decode prompts whose keys are known."""
        reader = self.decoder.method.prompt_reader(self.decoder.decoding.template_options)
        readings: list[Reading] = []
        for item in items:
            prompt = reader.read(item.entry.index, item.entry.prompt)
            readings.append((item.entry, dataclasses.replace(prompt, key=item.key)))
        self.decoder.decode(readings, on_finished)

    def _decode(
        self,
        items: Mapping[int, Keyed],
        put: Callable[[tuple[int | None, Finished | str]], None],
    ) -> None:
        with warnings.catch_warnings():
            # The job warns once, over all prompts.
            warnings.filterwarnings("ignore", "the standard error of Q")
            warnings.showwarning = lambda message, *_, **__: put((None, str(message)))
            self.decode(list(items.values()), lambda finished: put((finished.index, finished)))


@dataclasses.dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def _stream(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Iterate over what `work`, in a thread of its own, hands to its argument."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(messages.put)
        except BaseException as error:
            messages.put(_End(error))
        else:
            messages.put(_End())

    threading.Thread(target=run, daemon=True).start()
    while not isinstance(message := messages.get(), _End):
        yield message
    if message.error is not None:
        raise message.error


class RayDecoder:
    """A `Decoder` over workers.

    Args:
        pool: of `DecodeWorker`.
        cluster: what the pool was made with.
        decoding: how prompts are decoded.
        say: gets every warning of a worker, once.
    """

    def __init__(
        self,
        pool: WorkerPool[Keyed, Finished | str],
        cluster: Cluster,
        decoding: Decoding,
        say: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._workers = cluster.workers or 1
        self._batch_size = decoding.batch_size
        self._say = say
        self._said: set[str] = set()
        self._description: Description = pool.ask("describe")

    @property
    def config(self) -> DecodeConfig:
        """The settings, with those that the method fixes."""
        return self._description.config

    def model_settings(self) -> dict[str, Any]:
        """Return name and fingerprint of each model, by role."""
        return self._description.models

    def forecast(self, entries: Sequence[PromptEntry], done: Collection[int]) -> Forecast:
        """Return what the prompts that are not done are going to take; one worker counts."""
        found: Forecast = self._pool.ask("forecast", entries, set(done))
        return found

    def run(
        self,
        entries: Sequence[PromptEntry],
        done: Collection[int],
        on_finished: Callable[[Finished], None],
        progress: Progress,
    ) -> None:
        """Decode every prompt that is not done, as `Decoder.run` says; progress is by prompts."""
        if all(entry.index in done for entry in entries):
            return
        by_index = {entry.index: entry for entry in entries}
        pending: list[Keyed] = []
        for entry, key in zip(entries, self._pool.ask("keys", entries), strict=True):
            if entry.index in done:
                continue
            if isinstance(key, int):
                pending.append(Keyed(entry, key))
            else:
                on_finished(key)

        def on_message(head: None, message: Finished | str) -> None:
            if isinstance(message, Finished):
                on_finished(message)
            elif message not in self._said:
                self._said.add(message)
                self._say(message)

        def on_lost(head: None, index: int, error: WorkerLost) -> None:
            on_finished(Finished(error_record(by_index[index], error)))

        self._pool.run(self._groups(pending), on_message, on_lost, self._check)

    def _groups(self, pending: Sequence[Keyed]) -> Iterator[Group[Keyed]]:
        """Cut `pending` into groups, large ones first, so that all workers end at nearly once."""
        start = 0
        while start < len(pending):
            share = math.ceil((len(pending) - start) / (2 * self._workers))
            size = max(min(share, MAX_BATCHES * self._batch_size), self._batch_size)
            yield Group(None, {k.entry.index: k for k in pending[start : start + size]})
            start += size

    def _check(self, description: Description) -> None:
        """Refuse a worker that found other models under the same names."""
        differences = model_differences(self._description.models, description.models)
        if differences:
            raise TqFastError(
                f"a worker has other models than the first one: {'; '.join(differences)}"
            )


@contextlib.contextmanager
def open_workers(
    cluster: Cluster,
    models: ModelChoice,
    config: DecodeConfig,
    decoding: Decoding,
    say: Callable[[str], None],
) -> Iterator[RayDecoder]:
    """Start workers, each with models of its own, and end them after the block.

    Args:
        cluster: how many, with what, and where.
        models: which method and which models.
        config: settings.
        decoding: how prompts are decoded.
        say: gets a sentence about each warning and each death.

    Raises:
        InvalidArgument: Ray is not installed, or has no room for a worker.
        TqFastError: a setting or a model is wrong.
    """
    models.check(config)
    with connect(cluster, may_use_gpus=may_use_gpus(models.device)) as settled:
        make = functools.partial(DecodeWorker, models, config, decoding)
        pool: WorkerPool[Keyed, Finished | str] = WorkerPool(make, settled, say)
        try:
            yield RayDecoder(pool, settled, decoding, say)
        finally:
            pool.close()
