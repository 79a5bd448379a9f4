"""Where the tasks of an evaluation are carried out: in this process, in others, or by Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

import torch
from transformers.utils import logging

from ..errors import TqFastError
from ..jobs.prompt_file import PromptEntry
from ..jobs.record_file import Record
from ..ray.cluster import Cluster, connect
from .config import EvalConfig
from .work import EvalWorker, Task

# An idle process has so many seconds to end by itself.
_GOODBYE = 10.0

OnRecord: TypeAlias = Callable[[Task, Record], None]


def run_here(worker: EvalWorker, tasks: Sequence[Task], on_record: OnRecord) -> None:
    """Carry out `tasks` in this process."""
    for task in tasks:
        for record in worker.run(task):
            on_record(task, record)


def run_in_processes(
    config: EvalConfig,
    entries: Sequence[PromptEntry],
    tasks: Sequence[Task],
    on_record: OnRecord,
) -> None:
    """Carry out `tasks` in `config.workers` processes of one thread each.

    Raises:
        TqFastError: a process ended, or met an error that is every prompt's.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    busy: dict[Connection, Task] = {}
    processes = []
    try:
        for _ in range(min(config.workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, config, entries), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy[ours] = waiting.popleft()
            ours.send(busy[ours])
        while busy:
            ready = set(wait(list(busy)))
            for connection in [ours for ours in busy if ours in ready]:
                _hear(connection, busy, waiting, on_record)
    finally:
        # An idle process ends by itself once its connection is closed; one at work is terminated.
        for connection in busy:
            connection.close()
        for process in processes:
            process.join(0.0 if busy else _GOODBYE)
            if process.is_alive():
                process.terminate()
            process.join()


def run_on_ray(
    worker: EvalWorker,
    tasks: Sequence[Task],
    on_record: OnRecord,
    cluster: Cluster,
    say: Callable[[str], None],
) -> None:
    """Carry out `tasks` in workers of Ray; what a worker that dies had not finished runs again.

    Args:
        worker: of this process, whose configuration and prompts the others get.
        tasks: what is to do.
        on_record: called with every record.
        cluster: how many workers, with what, and where.
        say: gets a sentence about each death.

    Raises:
        TqFastError: Ray cannot be reached or has no room, workers cannot load, or one met an error
            that is every prompt's.
    """
    with connect(cluster, may_use_gpus=True) as settled:
        from ..ray.pool import Group, WorkerLost, WorkerPool

        numbers = itertools.count()
        groups = [Group(task, {next(numbers): idx for idx in task.prompts}) for task in tasks]
        prompt_of = {key: idx for group in groups for key, idx in group.items.items()}

        def on_lost(task: Task, key: int, error: WorkerLost) -> None:
            on_record(task, worker.error(task, prompt_of[key], error))

        make = functools.partial(RayEvalWorker, worker.config, worker.entries)
        pool: WorkerPool[int, Record] = WorkerPool(make, settled, say)
        try:
            pool.run(groups, on_record, on_lost, lambda description: None)
        finally:
            pool.close()


class RayEvalWorker:
    """Carries out tasks, or what is left of them, in a worker of Ray.

    Args:
        config: what is evaluated.
        entries: every prompt.
    """

    def __init__(self, config: EvalConfig, entries: Sequence[PromptEntry]) -> None:
        logging.disable_progress_bar()
        self._worker = EvalWorker(config, entries)

    def describe(self) -> None:
        """Say nothing: models are loaded when a task asks for them."""

    def run(self, task: Task, items: Mapping[int, int]) -> Iterator[tuple[int, Record]]:
        """Iterate over the records of the prompts `items`, by key."""
        keys = {idx: key for key, idx in items.items()}
        left = dataclasses.replace(task, prompts=tuple(keys))
        for record in self._worker.run(left):
            yield keys[record["prompt_idx"]], record


def _hear(
    connection: Connection, busy: dict[Connection, Task], waiting: deque[Task], on_record: OnRecord
) -> None:
    """Take one message of a process: a record, the end of its task (None), or its failure."""
    try:
        message = connection.recv()
    except EOFError:
        raise TqFastError(
            "a worker process ended by itself, perhaps for want of memory; what is finished is "
            "kept, and the same command goes on from there"
        ) from None
    if isinstance(message, str):
        raise TqFastError(f"a worker process failed: {message}")
    if message is not None:
        on_record(busy[connection], message)
    elif waiting:
        busy[connection] = waiting.popleft()
        connection.send(busy[connection])
    else:
        del busy[connection]
        connection.close()


def _serve(connection: Connection, config: EvalConfig, entries: Sequence[PromptEntry]) -> None:
    """Carry out the tasks that come through `connection`, until the other side is gone."""
    # The parent process handles interrupts, and ends this one by closing the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    worker = EvalWorker(config, entries)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                for record in worker.run(task):
                    connection.send(record)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                connection.send(f"{type(error).__name__}: {error}")
                return
            connection.send(None)
