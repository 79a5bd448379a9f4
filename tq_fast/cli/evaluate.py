"""`tq-fast eval`: methods side by side, every response a record, resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path

from rich.console import Console

from .._version import read_version
from ..errors import InvalidArgument
from ..evaluation.config import EvalConfig
from ..evaluation.config_file import find_config, load_config
from ..evaluation.methods import work_of
from ..evaluation.processes import run_here, run_in_processes, run_on_ray
from ..evaluation.prompts import check_readable
from ..evaluation.results import write_run, write_summary, write_text
from ..evaluation.values import ValueFit, check_others, describe_heads, drawing_config, place_values
from ..evaluation.work import EvalJob, EvalWorker, Task, check_no_others, open_jobs
from ..jobs.record_file import Record
from ..jobs.resume import describe_repairs
from ..ray.cluster import Cluster
from .progress import JobProgress, format_seconds
from .terminal import INTERRUPTED, loading_models, one_line, say


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """How an evaluation treats its output.

    Attributes:
        workers: processes; None: as the configuration says.
        overwrite: start again, whatever the output holds.
        retry_errors: decode again the prompts that failed.
        mix_versions: go on with records that another version of the package made.
        cluster: where the workers run; None: they are processes of this machine.
    """

    workers: int | None = None
    overwrite: bool = False
    retry_errors: bool = False
    mix_versions: bool = False
    cluster: Cluster | None = None

    @property
    def again(self) -> dict[str, bool]:
        """How files of records are opened."""
        names = ("overwrite", "retry_errors", "mix_versions")
        return {name: getattr(self, name) for name in names}


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
    config = place_values(load_config(find_config(config_name)), output)
    if options.workers is not None:
        if options.workers < 1:
            raise InvalidArgument(f"workers must be at least 1, got {options.workers}")
        config = dataclasses.replace(config, workers=options.workers)
    for source in (config.prompts, *(spec.prompts for spec in config.values)):
        check_readable(source)
    prompts = config.prompts.read()
    check_no_others(config, output, overwrite=options.overwrite)
    with contextlib.ExitStack() as stack:
        jobs = open_jobs(config, prompts, output, stack, **options.again)
        fits = [ValueFit(spec, output) for spec in config.values]
        heads = [fit.head for fit in fits]
        with loading_models(console):
            worker = EvalWorker(config, prompts)
            # What is wrong with any method is said before a head is fitted, which takes a while.
            for job in jobs:
                if job.method.value not in heads:
                    job.check(worker)
        write_text(output / "config.toml", config.text)
        for fit in fits:
            if _fit_value(fit, config, worker, options, console) == INTERRUPTED:
                return _say_stopped(output, console)
        for job in jobs:
            if job.method.value in heads:
                job.check(worker)
        _say_repairs(jobs, console)
        return _run_jobs(config, jobs, worker, options, output, console)


def _fit_value(
    fit: ValueFit,
    config: EvalConfig,
    worker: EvalWorker,
    options: EvalOptions,
    console: Console,
) -> int:
    """Draw the texts that a head lacks and fit it, unless it is there already."""
    spec, drawing = fit.spec, drawing_config(config, fit.spec)
    entries = drawing.prompts.read()
    check_others(spec, entries, [entry.prompt for entry in worker.entries])
    if options.overwrite:
        fit.forget()
    is_done = fit.is_done()
    with contextlib.ExitStack() as stack:
        jobs = open_jobs(drawing, entries, fit.folder, stack, **options.again)
        drawer = EvalWorker(drawing, entries, worker.pool)
        for job in jobs:
            job.check(drawer)
        _say_repairs(jobs, console)
        if _carry_out(drawing, jobs, drawer, options.cluster, console, "prompts") is None:
            return INTERRUPTED
    if is_done and fit.is_done():
        return 0

    def on_epoch(epoch: int, r2: float) -> None:
        say(console, f"{fit.label}: epoch {epoch}/{spec.fit['epochs']}, held-out R2 {r2:.3f}")

    try:
        fit.fit(
            worker.pool.load(spec.drawing.models),
            on_epoch=on_epoch,
            batch_size=config.batch_size,
            chat=spec.prompts.chat,
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of some jobs: how many prompts failed by job, and what was decoded."""

    failed: Counter[tuple[int, int]]
    num_texts: int
    seconds: float


def _carry_out(
    config: EvalConfig,
    jobs: list[EvalJob],
    worker: EvalWorker,
    cluster: Cluster | None,
    console: Console,
    noun: str,
) -> _Outcome | None:
    """Decode what the jobs lack; None where it was interrupted.

    Args:
        config: what is evaluated.
        jobs: checked.
        worker: decodes here where there are no other processes.
        cluster: where the workers run; None: they are processes of this machine.
        console: for progress and messages.
        noun: what the jobs count.
    """
    tasks = [task for job in jobs for task in job.tasks(config)]
    num_before = sum(len(job.earlier.kept) for job in jobs)
    if num_before and tasks:
        total = sum(len(job.entries) for job in jobs)
        say(console, f"resuming: {num_before} of {total} {noun} are done")
    by_key = {job.key: job for job in jobs}
    failed = Counter({job.key: len(job.earlier.failed) for job in jobs})
    work = {
        (*job.key, index): work_of(job.method)
        for job in jobs
        for index in range(len(job.entries))
        if index not in job.earlier.kept
    }
    progress = JobProgress(console, noun, work, num_before=num_before)

    def write(task: Task, record: Record) -> None:
        job = by_key[(task.setup, task.method)]
        job.file.append({**record, "settings": job.fingerprint, "tq_fast": read_version()})
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
            if cluster is not None and tasks:
                asked = dataclasses.replace(cluster, workers=config.workers)
                run_on_ray(worker, tasks, write, asked, lambda text: say(console, text))
            elif config.workers == 1 or not tasks:
                run_here(worker, tasks, write)
            else:
                run_in_processes(config, worker.entries, tasks, write)
    except KeyboardInterrupt:
        return None
    texts = sum(by_key[key[:2]].method.num_texts for key in work)
    return _Outcome(failed, texts, progress.seconds if tasks else 0.0)


def _run_jobs(
    config: EvalConfig,
    jobs: list[EvalJob],
    worker: EvalWorker,
    options: EvalOptions,
    output: Path,
    console: Console,
) -> int:
    """Decode what the jobs lack, and write the tables; return the exit code."""
    outcome = _carry_out(config, jobs, worker, options.cluster, console, "responses")
    if outcome is None:
        return _say_stopped(output, console)
    took = ""
    if outcome.num_texts:
        write_run(output, config.workers, responses=outcome.num_texts, seconds=outcome.seconds)
        took = f"; this run took {format_seconds(outcome.seconds)}"
    write_summary(output, config, describe_heads(config, output))
    done = sum((len(job.entries) - outcome.failed[job.key]) * job.method.num_texts for job in jobs)
    say(console, f"{done} responses{took}")
    num_failed = outcome.failed.total()
    if num_failed:
        again = "the same command with --retry-errors decodes them again"
        say(console, f"{num_failed} failed; {again}")
    say(console, f"tables: {output / 'table.md'}; pictures: tq-fast report {output}")
    return 1 if num_failed else 0


def _say_stopped(output: Path, console: Console) -> int:
    say(console, f"stopped; the same command goes on from what is in {output}")
    return INTERRUPTED


def _say_repairs(jobs: list[EvalJob], console: Console) -> None:
    for job in jobs:
        for repair in describe_repairs(job.earlier):
            say(console, f"{job.label}: {repair}")
