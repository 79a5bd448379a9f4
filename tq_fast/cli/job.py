"""A job: a file of prompts in, one JSON record a prompt out, resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .._version import read_version
from ..config import DecodeConfig
from ..errors import ServerUnavailable
from ..jobs.decoding import Decoder, Decoding, EntryDecoder, Finished
from ..jobs.forecast import Forecast
from ..jobs.prompt_file import PromptEntry, read_prompt_file
from ..jobs.record_file import OutputRefused, RecordFile
from ..jobs.resume import (
    Earlier,
    ModelChoice,
    check_models,
    check_stated,
    check_version,
    describe_repairs,
    make_settings,
    read_earlier,
    stated_settings,
)
from ..ray.cluster import Cluster, require_ray
from ..transfer.budget import check_sizes
from ..transfer.warnings import describe_noise
from .progress import JobProgress, format_seconds
from .terminal import INTERRUPTED, loading_models, one_line, say


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """How a job runs and treats its output.

    Attributes:
        batch_size: prompts that are decoded together, at most.
        memory_budget: bytes of KV and logits, at most; None: as much as batch_size takes.
        traces: whether records hold a trace of every step.
        overwrite: start again, whatever the output holds.
        retry_errors: decode again the prompts that failed.
        mix_versions: go on with records that another version of the package made.
        template_options: those of `TransferDecoder.decode`.
        cluster: the workers that decode; None: this process does.

    Raises:
        InvalidArgument: batch_size or memory_budget is no positive integer.
    """

    batch_size: int = 8
    memory_budget: int | None = None
    traces: bool = False
    overwrite: bool = False
    retry_errors: bool = False
    mix_versions: bool = False
    template_options: Mapping[str, Any] | None = None
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        # Wrong sizes are refused before any model is loaded.
        check_sizes(self.batch_size, self.memory_budget)

    @property
    def decoding(self) -> Decoding:
        """How prompts are decoded."""
        return Decoding(self.batch_size, self.memory_budget, self.traces, self.template_options)


@contextlib.contextmanager
def open_job(
    config: DecodeConfig,
    models: ModelChoice,
    prompts: str,
    output: Path,
    options: JobOptions,
    console: Console,
) -> Iterator[DecodeJob]:
    """Load the models of a job and bring its output into order; the output is locked inside.

    Args:
        config: settings.
        models: which method and which models.
        prompts: file of the prompts; "-" is standard input.
        output: JSONL file of the records.
        options: how the job runs.
        console: for progress and messages.

    Raises:
        OutputRefused: the output cannot be written, or belongs to another job.
        TqFastError: an argument is wrong; nothing was decoded.
    """
    entries = read_prompt_file(prompts)
    if prompts != "-" and output.exists() and os.path.samefile(prompts, output):
        raise OutputRefused(f"output {str(output)!r} is the file of the prompts")
    stated = stated_settings(
        config,
        models,
        traces=options.traces,
        entries=entries,
        template_options=options.template_options,
    )
    with RecordFile(output) as file, contextlib.ExitStack() as stack:
        earlier = Earlier()
        if not options.overwrite:
            earlier = read_earlier(file, entries, retry_errors=options.retry_errors)
            check_stated(file, earlier, stated, entries)
            is_done = len(earlier.kept) == len(entries)
            check_version(output, [earlier], is_done=is_done, mix_versions=options.mix_versions)
        # Settings are checked against the models before the output changes.
        decoder = stack.enter_context(_open_decoder(config, models, options, console))
        settings = make_settings(stated, decoder.model_settings())
        check_models(file, earlier, settings)
        for repair in describe_repairs(earlier):
            say(console, repair)
        file.keep(sorted(earlier.kept.values(), key=lambda line: line.start))
        file.write_settings(settings)
        yield DecodeJob(decoder, entries, earlier, file, settings["fingerprint"], console)


@contextlib.contextmanager
def _open_decoder(
    config: DecodeConfig, models: ModelChoice, options: JobOptions, console: Console
) -> Iterator[Decoder]:
    """Load the models, here or in the workers that the options ask for."""
    if options.cluster is None:
        with loading_models(console):
            decoder = EntryDecoder(models, config, options.decoding)
        yield decoder
        return
    require_ray("decoding in workers")
    from ..ray.job import open_workers

    say(console, f"loading the models in {options.cluster.describe()}")
    with open_workers(
        options.cluster, models, config, options.decoding, lambda text: say(console, text)
    ) as workers:
        yield workers


class DecodeJob:
    """Decodes what is pending and writes the records."""

    def __init__(
        self,
        decoder: Decoder,
        entries: Sequence[PromptEntry],
        earlier: Earlier,
        file: RecordFile,
        fingerprint: str,
        console: Console,
    ) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.entries = entries
        self.file = file
        self.fingerprint = fingerprint
        self.console = console
        self.done = set(earlier.kept)
        self.failed = set(earlier.failed)
        self.num_steps = 0
        self.num_noisy_steps = 0
        self.pending = [index for index in range(len(entries)) if index not in self.done]
        self.progress: JobProgress[int] = JobProgress(console, "prompts", {})

    def run(self) -> int:
        """Decode to the end or to an interrupt.

        Returns:
            The exit code: 0 when every prompt has a response, 1 when some have an error record,
            130 when it was interrupted.

        Raises:
            ServerUnavailable: a model's server stayed away; the message says what is done.
        """
        if self.done and self.pending:
            say(
                self.console,
                f"resuming: {len(self.done)} of {len(self.entries)} prompts are done",
            )
        try:
            with warnings.catch_warnings():
                # The decoder warns for every group; the summary warns once, over all prompts.
                warnings.filterwarnings("ignore", "the standard error of Q")
                warnings.showwarning = lambda message, *_, **__: say(self.console, str(message))
                self._forecast()
                with self.progress:
                    self.decoder.run(self.entries, frozenset(self.done), self._write, self.progress)
        except KeyboardInterrupt:
            say(
                self.console,
                f"stopped: {len(self.done)} of {len(self.entries)} prompts are done in "
                f"{self.file.path}; the same command goes on from there",
            )
            return INTERRUPTED
        except ServerUnavailable as error:
            raise ServerUnavailable(
                f"{error}; {len(self.done)} of {len(self.entries)} prompts are done in "
                f"{self.file.path}; the same command goes on from there, with another URL where "
                "the server has another"
            ) from error
        self._summarise()
        return 1 if self.failed else 0

    def _forecast(self) -> None:
        """Say what is left to be done, and how much it is."""
        left = self.decoder.forecast(self.entries, self.done)
        if left.num_prompts:
            say(self.console, describe_forecast(left, self.config))
        self.progress = JobProgress(
            self.console,
            "prompts",
            dict.fromkeys(self.pending, left.tokens_per_prompt),
            num_before=len(self.done),
            announces=True,
            leaves_out="and the time to score them" if left.scores_texts else "",
        )

    def _write(self, finished: Finished) -> None:
        index, record = finished.index, finished.record
        self.file.append({**record, "settings": self.fingerprint, "tq_fast": read_version()})
        self.done.add(index)
        is_failed = "error" in record
        if is_failed:
            self.failed.add(index)
            described = record["error"]
            if "traceback" in described:
                say(self.console, described["traceback"].rstrip())
            say(self.console, f"prompt {index} failed: {one_line(described['message'])}")
        self.num_steps += finished.num_steps
        self.num_noisy_steps += finished.num_noisy_steps
        self.progress.end(index, is_failed=is_failed, num_tokens=finished.num_tokens)

    def _summarise(self) -> None:
        total = len(self.entries)
        text = f"{total - len(self.failed)} of {total} prompts have a response"
        if self.pending:
            took = format_seconds(self.progress.seconds)
            text += f"; this run took {took}, {self.progress.rate:.1f} tokens/s"
        else:
            text += "; nothing was left to do"
        say(self.console, f"{text}: {self.file.path}")
        if self.failed:
            named = ", ".join(map(str, sorted(self.failed)[:10]))
            named += ", ..." if len(self.failed) > 10 else ""
            again = "the same command with --retry-errors decodes them again"
            say(self.console, f"{len(self.failed)} failed (index {named}); {again}")
        if self.num_noisy_steps:
            noise = describe_noise(self.num_noisy_steps, self.num_steps, self.config.alpha)
            say(self.console, f"warning: {noise}")


def describe_forecast(left: Forecast, config: DecodeConfig) -> str:
    """Say in a line what is going to be decoded and what it takes.

    Args:
        left: what is to be said.
        config: the settings.
    """
    num, each = left.num_prompts, config.num_return_sequences
    lengths = f"{left.shortest:,}"
    if left.longest > left.shortest:
        lengths += f" to {left.longest:,}"
    counted = [
        f"{describe_count(count)} of {role}" for role, count in left.token_forwards.items() if count
    ]
    return (
        f"{num:,} {'prompt' if num == 1 else 'prompts'} of {lengths} "
        f"{'token' if left.longest == 1 else 'tokens'}, "
        f"{'a response' if each == 1 else f'{each} responses'} of at most "
        f"{config.max_new_tokens:,} tokens each: {'at most' if left.is_bound else 'about'} "
        f"{', '.join(counted)} (token-forwards: tokens that go through each model)"
    )


def describe_count(number: int) -> str:
    """Write a count with three digits: 987, 45.3 k, 1.2 M, 3.46 G."""
    for scale, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{float(f'{number / scale:.3g}'):,.6g} {letter}"
    return str(number)
