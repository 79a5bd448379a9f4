"""`tq-fast eval`: methods side by side, every response a record, resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path

from rich.console import Console

from ..errors import InvalidArgument
from ..evaluation.config import EvalConfig
from ..evaluation.config_file import find_config, load_config
from ..evaluation.processes import run_here, run_in_processes
from ..evaluation.prompts import check_readable
from ..evaluation.results import write_run, write_summary, write_text
from ..evaluation.work import EvalJob, EvalWorker, Task, check_no_others, open_jobs, work_of
from ..jobs.record_file import Record
from ..jobs.resume import describe_repairs
from .progress import JobProgress, format_seconds
from .terminal import INTERRUPTED, loading_models, one_line, say


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
    prompts = config.prompts.read()
    check_no_others(config, output, overwrite=options.overwrite)
    with contextlib.ExitStack() as stack:
        again = {"overwrite": options.overwrite, "retry_errors": options.retry_errors}
        jobs = open_jobs(config, prompts, output, stack, **again)
        with loading_models(console):
            worker = EvalWorker(config, prompts)
            for job in jobs:
                job.check(worker)
        for job in jobs:
            for repair in describe_repairs(job.earlier):
                say(console, f"{job.label}: {repair}")
        write_text(output / "config.toml", config.text)
        return _run_jobs(config, jobs, worker, output, console)


def _run_jobs(
    config: EvalConfig, jobs: list[EvalJob], worker: EvalWorker, output: Path, console: Console
) -> int:
    tasks = [task for job in jobs for task in job.tasks(config)]
    num_before = sum(len(job.earlier.kept) for job in jobs)
    if num_before and tasks:
        total = sum(len(job.entries) for job in jobs)
        say(console, f"resuming: {num_before} of {total} responses are done")
    by_key = {job.key: job for job in jobs}
    failed = Counter({job.key: len(job.earlier.failed) for job in jobs})
    work = {
        (*job.key, index): work_of(job.method)
        for job in jobs
        for index in range(len(job.entries))
        if index not in job.earlier.kept
    }
    progress = JobProgress(console, "responses", work, num_before=num_before)

    def write(task: Task, record: Record) -> None:
        job = by_key[(task.setup, task.method)]
        job.file.append({**record, "settings": job.fingerprint})
        if "error" in record:
            failed[job.key] += 1
            described = record["error"]
            if "traceback" in described:
                say(console, described["traceback"].rstrip())
            where = f"{job.label}, prompt {record['prompt_idx']}, seed {record['seed']}"
            say(console, f"{where} failed: {one_line(described['message'])}")
        progress.end((*job.key, record["index"]), is_failed="error" in record, label=job.label)

    try:
        with progress:
            if config.workers == 1 or not tasks:
                run_here(worker, tasks, write)
            else:
                run_in_processes(config, worker.entries, tasks, write)
    except KeyboardInterrupt:
        say(console, f"stopped; the same command goes on from what is in {output}")
        return INTERRUPTED
    if tasks:
        texts = sum(by_key[key[:2]].method.num_texts for key in work)
        write_run(output, config.workers, responses=texts, seconds=progress.seconds)
    write_summary(output, config)
    took = f"; this run took {format_seconds(progress.seconds)}" if tasks else ""
    done = sum((len(job.entries) - failed[job.key]) * job.method.num_texts for job in jobs)
    say(console, f"{done} responses{took}")
    num_failed = failed.total()
    if num_failed:
        again = "the same command with --retry-errors decodes them again"
        say(console, f"{num_failed} failed; {again}")
    say(console, f"tables: {output / 'table.md'}; pictures: tq-fast report {output}")
    return 1 if num_failed else 0
