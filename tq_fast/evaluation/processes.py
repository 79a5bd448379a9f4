"""Where the tasks of an evaluation are carried out: in this process, or in others."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

import torch
from transformers.utils import logging

from ..errors import TqFastError
from ..jobs.prompt_file import PromptEntry
from ..jobs.record_file import Record
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
