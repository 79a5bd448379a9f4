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

from ..config import DecodeConfig
from ..errors import ServerUnavailable
from ..jobs.prompt_file import PromptEntry, read_prompt_file
from ..jobs.record_file import OutputRefused, Record, RecordFile
from ..jobs.records import ends_the_job, error_record, response_record
from ..jobs.resume import (
    Earlier,
    ModelChoice,
    check_models,
    check_stated,
    describe_repairs,
    make_settings,
    model_settings,
    read_earlier,
    stated_settings,
)
from ..presets.call import OpenMethod
from ..prompts import Prompt
from ..results import PromptResult
from ..transfer.warnings import count_noisy_steps, describe_noise
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
        template_options: those of `TransferDecoder.decode`.
    """

    batch_size: int = 8
    memory_budget: int | None = None
    traces: bool = False
    overwrite: bool = False
    retry_errors: bool = False
    template_options: Mapping[str, Any] | None = None


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
    with RecordFile(output) as file:
        earlier = Earlier()
        if not options.overwrite:
            earlier = read_earlier(file, entries, retry_errors=options.retry_errors)
            check_stated(file, earlier, stated, entries)
        with loading_models(console):
            method = models.load(config)
        # A call without prompts checks the settings against the models before the output changes.
        method.decode(
            [],
            template_options=options.template_options,
            batch_size=options.batch_size,
            memory_budget=options.memory_budget,
        )
        settings = make_settings(stated, model_settings(method, models))
        check_models(file, earlier, settings)
        for repair in describe_repairs(earlier):
            say(console, repair)
        file.keep(sorted(earlier.kept.values(), key=lambda line: line.start))
        file.write_settings(settings)
        yield DecodeJob(method, entries, earlier, options, file, settings["fingerprint"], console)


class DecodeJob:
    """Decodes what is pending and writes the records."""

    def __init__(
        self,
        method: OpenMethod,
        entries: Sequence[PromptEntry],
        earlier: Earlier,
        options: JobOptions,
        file: RecordFile,
        fingerprint: str,
        console: Console,
    ) -> None:
        self.method = method
        self.config = method.config
        self.entries = entries
        self.traces = options.traces
        # A value head can be fitted later to the texts that the best of n was chosen from.
        self.keeps_texts = method.name == "best_of_n"
        self.template_options = options.template_options
        self.batch_size = options.batch_size
        self.memory_budget = options.memory_budget
        self.file = file
        self.fingerprint = fingerprint
        self.console = console
        self.done = set(earlier.kept)
        self.failed = set(earlier.failed)
        self.num_steps = 0
        self.num_noisy_steps = 0
        pending = [index for index in range(len(entries)) if index not in self.done]
        self.num_pending = len(pending)
        self.progress = JobProgress(
            console,
            "prompts",
            dict.fromkeys(pending, self.config.max_new_tokens * self.config.num_return_sequences),
            num_before=len(self.done),
        )

    def run(self) -> int:
        """Decode to the end or to an interrupt.

        Returns:
            The exit code: 0 when every prompt has a response, 1 when some have an error record,
            130 when it was interrupted.

        Raises:
            ServerUnavailable: a model's server stayed away; the message says what is done.
        """
        if self.done and self.num_pending:
            say(
                self.console,
                f"resuming: {len(self.done)} of {len(self.entries)} prompts are done",
            )
        try:
            with self.progress, warnings.catch_warnings():
                # The decoder warns for every group; the summary warns once, over all prompts.
                warnings.filterwarnings("ignore", "the standard error of Q")
                warnings.showwarning = lambda message, *_, **__: say(self.console, str(message))
                self._decode_all()
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

    def _decode_all(self) -> None:
        # The reader counts equal prompts, so it reads those that are done too: every prompt then
        # has the random stream of an uninterrupted run.
        reader = self.method.prompt_reader(self.template_options)
        waiting: list[tuple[int, Prompt]] = []
        for index, entry in enumerate(self.entries):
            try:
                prompt = reader.read(index, entry.prompt)
                self.method.check_length(index, prompt)
            except Exception as error:
                if index not in self.done:
                    self._write_error(index, error)
            else:
                if index not in self.done:
                    waiting.append((index, prompt))
        while waiting:
            waiting = self._decode_most(waiting)

    def _decode_most(self, waiting: list[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
        """Decode `waiting`; if a prompt fails, find it and return what was not begun."""
        try:
            self._decode(waiting)
            return []
        except Exception as error:
            left = [(index, prompt) for index, prompt in waiting if index not in self.done]
            if ends_the_job(error) or not left:
                raise
        # The forest takes prompts in order, so that those under way are the first that are left.
        # They run again after the except block, where the error and the memory that its traceback
        # held are gone.
        self._decode_group(left[: self.batch_size])
        return left[self.batch_size :]

    def _decode_group(self, group: list[tuple[int, Prompt]]) -> None:
        """Decode `group` together; if that fails, its halves, down to the prompt that fails."""
        self.progress.restart([index for index, _ in group])
        try:
            self._decode(group)
            return
        except Exception as error:
            left = [(index, prompt) for index, prompt in group if index not in self.done]
            if ends_the_job(error) or not left:
                raise
            if len(group) == 1:
                self._write_error(group[0][0], error)
                return
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._decode_group(half)

    def _decode(self, prompts: list[tuple[int, Prompt]]) -> None:
        indices = [index for index, _ in prompts]
        num = self.config.num_return_sequences
        results: dict[int, PromptResult] = {}

        def on_finished(idx: int, result: PromptResult) -> None:
            results[idx] = result
            # The responses to one prompt stand in a row, and make one record.
            mine = range(idx - idx % num, idx - idx % num + num)
            if all(other in results for other in mine):
                self._write_response(indices[idx // num], [results.pop(i) for i in mine])

        self.method.decode(
            [prompt for _, prompt in prompts],
            batch_size=self.batch_size,
            memory_budget=self.memory_budget,
            on_token=lambda idx: self.progress.token(indices[idx // num]),
            on_finished=on_finished,
        )

    def _write_response(self, index: int, results: Sequence[PromptResult]) -> None:
        entry = self.entries[index]
        record = response_record(entry, results, traces=self.traces, texts=self.keeps_texts)
        self._write(index, record, num_tokens=sum(len(result.sequence) for result in results))
        for result in results:
            self.num_steps += len(result.trace)
            self.num_noisy_steps += count_noisy_steps(result.trace, self.config.alpha)

    def _write_error(self, index: int, error: Exception) -> None:
        record = error_record(self.entries[index], error)
        self._write(index, record)
        described = record["error"]
        if "traceback" in described:
            say(self.console, described["traceback"].rstrip())
        say(self.console, f"prompt {index} failed: {one_line(described['message'])}")

    def _write(self, index: int, record: Record, *, num_tokens: int = 0) -> None:
        self.file.append({**record, "settings": self.fingerprint})
        self.done.add(index)
        is_failed = "error" in record
        if is_failed:
            self.failed.add(index)
        self.progress.end(index, is_failed=is_failed, num_tokens=num_tokens)

    def _summarise(self) -> None:
        total = len(self.entries)
        text = f"{total - len(self.failed)} of {total} prompts have a response"
        if self.num_pending:
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
