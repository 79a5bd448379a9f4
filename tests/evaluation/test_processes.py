"""Worker processes that fail."""

from __future__ import annotations

from collections import deque
from multiprocessing import Pipe

import pytest

from tq_fast.errors import TqFastError
from tq_fast.evaluation.processes import _hear
from tq_fast.evaluation.work import Task

TASK, NEXT = Task(0, 0, 1, 0, (0, 1)), Task(0, 1, 1, 0, (2,))


def test_a_worker_hands_in_records_and_gets_the_next_task() -> None:
    ours, theirs = Pipe()
    busy, waiting, heard = {ours: TASK}, deque([NEXT]), []
    for message in ({"index": 0}, None):
        theirs.send(message)
        _hear(ours, busy, waiting, lambda task, record: heard.append((task, record)))
    assert heard == [(TASK, {"index": 0})]
    assert theirs.recv() == NEXT and busy == {ours: NEXT}
    theirs.send(None)
    _hear(ours, busy, waiting, lambda task, record: None)
    assert not busy
    with pytest.raises(EOFError):
        theirs.recv()


def test_a_worker_that_ends_or_fails_ends_the_evaluation() -> None:
    ours, theirs = Pipe()
    theirs.send("UnsupportedModel: baseline: no")
    with pytest.raises(TqFastError, match="a worker process failed: UnsupportedModel"):
        _hear(ours, {ours: TASK}, deque(), lambda task, record: None)
    theirs.close()
    with pytest.raises(TqFastError, match=r"ended by itself.*goes on from there"):
        _hear(ours, {ours: TASK}, deque(), lambda task, record: None)
