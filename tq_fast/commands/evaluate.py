"""`tq-fast eval`: methods side by side, every response a record, resumable at any moment.

The folder of results:

    config.toml                          what was run
    records/SETUP/METHOD.jsonl           a record a prompt and seed, with its measures
    records/SETUP/METHOD.jsonl.settings.json
    versions.json  summary.json  table.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from .._version import __version__
from ..errors import InvalidArgument
from ..evaluation.config import EvalConfig, MethodSpec, SetupSpec
from ..evaluation.config_file import find_config, load_config
from ..evaluation.model_pool import LoadedModels
from ..evaluation.prompt_source import check_readable
from ..evaluation.summary import summarise, write_table
from .eval_progress import EvalProgress, work_of
from .eval_work import EvalWorker, Record, Task, run_here, run_in_processes
from .info import cpu_name
from .job_progress import format_seconds
from .job_resume import Earlier, check_models, check_stated, describe_repairs, read_earlier
from .job_settings import fingerprint_model, make_settings
from .prompt_file import PromptEntry, digest_prompts, read_prompt_file
from .record_file import OutputRefused, RecordFile
from .terminal import loading_models, one_line, say

INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """How an evaluation treats its output.

    Attributes:
        workers: processes; None: as the configuration says.
        overwrite: start again, whatever the output holds.
        retry_errors: decode again the prompts that failed.
    """

    workers: int | None = None
    overwrite: bool = False
    retry_errors: bool = False


@dataclasses.dataclass
class _Job:
    """One method of one set-up: its file, and what is there already."""

    key: tuple[int, int]
    setup: SetupSpec
    method: MethodSpec
    file: RecordFile
    entries: list[PromptEntry]
    earlier: Earlier
    stated: dict[str, Any]
    fingerprint: str = ""

    @property
    def label(self) -> str:
        return f"{self.setup.name}/{self.method.name}"


def run_eval(config_name: str, output: Path, options: EvalOptions, console: Console) -> int:
    """Evaluate what has no record in `output` yet, and write the tables.

    Args:
        config_name: a TOML file, or a shipped recipe.
        output: the folder of results; it may be new.
        options: how to treat it.
        console: for progress and messages.

    Returns:
        The exit code: 0 when every prompt has a response by every method, 1 when some have an
        error record, 130 when it was interrupted.

    Raises:
        OutputRefused: the output cannot be written, or belongs to another evaluation.
        TqFastError: the configuration is wrong (before any model is loaded), or a model is.
    """
    config = load_config(find_config(config_name))
    if options.workers is not None:
        if options.workers < 1:
            raise InvalidArgument(f"workers must be at least 1, got {options.workers}")
        config = dataclasses.replace(config, workers=options.workers)
    check_readable(config.prompts)
    prompts = read_prompts_of(config)
    with contextlib.ExitStack() as stack:
        jobs = _open_jobs(config, prompts, output, options, stack)
        with loading_models(console):
            worker = EvalWorker(config, prompts)
            for job in jobs:
                _check_job(job, worker)
        for job in jobs:
            for repair in describe_repairs(job.earlier):
                say(console, f"{job.label}: {repair}")
        write_text(output / "config.toml", config.text)
        versions = _versions(config)
        write_text(output / "versions.json", json.dumps(versions, indent=2) + "\n")
        return _run_jobs(config, jobs, worker, output, console)


def read_prompts_of(config: EvalConfig) -> list[PromptEntry]:
    """The prompts of a configuration, numbered from 0.

    Raises:
        InvalidArgument: they cannot be read, or there are none.
    """
    source = config.prompts
    if source.kind == "file":
        return read_prompt_file(source.name)[: source.limit]
    texts = source.read_texts()
    if not texts:
        raise InvalidArgument(f"prompts: {source.name!r} holds none")
    return [PromptEntry(index, None, text) for index, text in enumerate(texts)]


def records_path(output: Path, setup: SetupSpec, method: MethodSpec) -> Path:
    """Where the records of a method lie."""
    return output / "records" / setup.name / f"{method.name}.jsonl"


def read_records(output: Path, config: EvalConfig) -> dict[tuple[str, str], list[Record]]:
    """The records of every (set-up, method) in a folder of results; one an index, no cut lines."""
    records: dict[tuple[str, str], list[Record]] = {}
    for setup in config.setups:
        for method in setup.methods:
            file = RecordFile(records_path(output, setup, method))
            by_index: dict[int, Record] = {}
            for line in file.lines():
                record = line.record
                is_better = record is not None and (
                    "error" not in record or record["index"] not in by_index
                )
                if is_better:
                    by_index[record["index"]] = record
            records[(setup.name, method.name)] = [by_index[index] for index in sorted(by_index)]
    return records


def write_summary(output: Path, config: EvalConfig) -> dict[str, Any]:
    """Compute the summary of the records, write it with its tables, and return it."""
    summary = summarise(config, read_records(output, config))
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(output / "table.md", write_table(summary))
    return summary


def _open_jobs(
    config: EvalConfig,
    prompts: Sequence[PromptEntry],
    output: Path,
    options: EvalOptions,
    stack: contextlib.ExitStack,
) -> list[_Job]:
    """Open every file of records and check, before any model is loaded, that it may go on."""
    digest = digest_prompts(list(prompts))
    jobs = []
    for i, setup in enumerate(config.setups):
        for j, method in enumerate(setup.methods):
            path = records_path(output, setup, method)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputRefused(
                    f"output {str(output)!r} cannot be written: {error.strerror}"
                ) from error
            file = stack.enter_context(RecordFile(path))
            entries = [
                dataclasses.replace(prompt, index=seed_idx * len(prompts) + prompt.index)
                for seed_idx in range(len(config.seeds))
                for prompt in prompts
            ]
            earlier = Earlier()
            stated = _stated(config, setup, method, digest, len(prompts))
            if not options.overwrite:
                earlier = read_earlier(file, entries, retry_errors=options.retry_errors)
                check_stated(file, earlier, stated)
            jobs.append(_Job((i, j), setup, method, file, entries, earlier, stated))
    return jobs


def _stated(
    config: EvalConfig, setup: SetupSpec, method: MethodSpec, digest: str, count: int
) -> dict[str, Any]:
    """Everything that the configuration says about the records of a method."""
    scored_by = {role: setup.models.get(role) for role in ("reward", "gold", "judge", "embedder")}
    stated = {
        "method": method.method,
        **dict(method.own),
        **{k: v for k, v in dataclasses.asdict(method.config(0)).items() if k != "seed"},
        "seeds": list(config.seeds),
        **{f"scored by {role}": source and str(source) for role, source in scored_by.items()},
        "chat": config.prompts.chat,
        "traces": config.traces,
        "number of prompts": count,
        "prompts": digest,
    }
    # As they look when they are read back.
    return json.loads(json.dumps(stated))


def _check_job(job: _Job, worker: EvalWorker) -> None:
    """Load what a method needs, try it on no prompt, and settle what its file holds."""
    worker.models_of(job.setup)
    worker.check(job.method)
    settings = make_settings(job.stated, _model_settings(job, worker.models_of(job.method)))
    check_models(job.file, job.earlier, settings)
    job.fingerprint = settings["fingerprint"]
    job.file.keep(sorted(job.earlier.kept.values(), key=lambda line: line.start))
    job.file.write_settings(settings)


def _model_settings(job: _Job, loaded: LoadedModels) -> dict[str, Any]:
    """Name and fingerprint of each model by role; a function has its name alone."""
    settings = {}
    for role, model in loaded.languages.items():
        settings[role] = {"fingerprint": fingerprint_model(model, loaded.tokenizer)}
    for role, reward in loaded.rewards.items():
        if hasattr(reward, "model"):
            fingerprint = fingerprint_model(reward.model, reward.tokenizer)
        else:
            fingerprint = reward.function.__qualname__
        settings[role] = {"fingerprint": fingerprint}
    return {
        role: {"name": str(job.method.models[role]), **found} for role, found in settings.items()
    }


def _run_jobs(
    config: EvalConfig, jobs: list[_Job], worker: EvalWorker, output: Path, console: Console
) -> int:
    tasks = [task for job in jobs for task in _tasks(config, job)]
    pending: dict[tuple[int, int], int] = {}
    for task in tasks:
        key = (task.setup, task.method)
        pending[key] = pending.get(key, 0) + len(task.prompts)
    num_before = sum(len(job.earlier.kept) for job in jobs)
    if num_before and tasks:
        total = sum(len(job.entries) for job in jobs)
        say(console, f"resuming: {num_before} of {total} responses are done")
    by_key = {job.key: job for job in jobs}
    failed = sum(len(job.earlier.failed) for job in jobs)
    work = {job.key: work_of(job.method) for job in jobs}
    progress = EvalProgress(console, pending, work, num_before)

    def write(task: Task, record: Record) -> None:
        nonlocal failed
        job = by_key[(task.setup, task.method)]
        job.file.append({**record, "settings": job.fingerprint})
        if "error" in record:
            failed += 1
            described = record["error"]
            if "traceback" in described:
                say(console, described["traceback"].rstrip())
            where = f"{job.label}, prompt {record['prompt_idx']}, seed {record['seed']}"
            say(console, f"{where} failed: {one_line(described['message'])}")
        progress.count(job.key, job.label, is_failed="error" in record)

    try:
        with progress:
            if config.workers == 1 or not tasks:
                run_here(worker, tasks, write)
            else:
                run_in_processes(config, worker.entries, tasks, write)
    except KeyboardInterrupt:
        say(console, f"stopped; the same command goes on from what is in {output}")
        return INTERRUPTED
    _record_time(output, progress.seconds if tasks else 0.0)
    write_summary(output, config)
    took = f"; this run took {format_seconds(progress.seconds)}" if tasks else ""
    say(console, f"{sum(len(job.entries) for job in jobs) - failed} responses{took}")
    if failed:
        say(console, f"{failed} failed; the same command with --retry-errors decodes them again")
    say(console, f"tables: {output / 'table.md'}; pictures: tq-fast report {output}")
    return 1 if failed else 0


def _tasks(config: EvalConfig, job: _Job) -> list[Task]:
    """Groups of prompts that have no record yet, none across two seeds."""
    count = len(job.entries) // len(config.seeds)
    tasks = []
    for seed_idx, seed in enumerate(config.seeds):
        left = [i for i in range(count) if seed_idx * count + i not in job.earlier.kept]
        for start in range(0, len(left), config.batch_size):
            group = tuple(left[start : start + config.batch_size])
            tasks.append(Task(*job.key, seed, seed_idx, group))
    return tasks


def _versions(config: EvalConfig) -> dict[str, Any]:
    return {
        "tq_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "workers": config.workers,
    }


def _record_time(output: Path, seconds: float) -> None:
    """Add the wall and CPU seconds of this run to versions.json."""
    path = output / "versions.json"
    versions = json.loads(path.read_text())
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    versions["this run"] = {"wall_seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    versions["finished"] = time.strftime("%Y-%m-%d", time.gmtime())
    write_text(path, json.dumps(versions, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go.

    Raises:
        OutputRefused: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputRefused(f"output {str(path)!r} cannot be written: {error.strerror}") from error
