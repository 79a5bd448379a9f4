"""Worker processes that fail, and how much work a method is."""

from __future__ import annotations

from collections import deque
from multiprocessing import Pipe

import pytest

from tq_fast.errors import TqFastError
from tq_fast.evaluation.config import MethodSpec
from tq_fast.evaluation.processes import _hear
from tq_fast.evaluation.work import Task, work_of

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


def spec(method: str, **decode: object) -> MethodSpec:
    own = {"n": 8} if method == "best_of_n" else {}
    return MethodSpec(method, method, method, own, decode, {}, None, method)


def test_methods_that_roll_out_count_as_more_work() -> None:
    small = {"k": 4, "num_rollouts": 2, "horizon": 6}
    costs = [
        work_of(spec("sft")),
        work_of(spec("best_of_n")),
        work_of(spec("transfer_q", **small)),
        work_of(spec("transfer_q_indirect", **small, transfer="indirect", beta=1.0)),
        work_of(spec("transfer_q", **{**small, "horizon": None, "max_new_tokens": 64})),
    ]
    assert costs == sorted(costs) and len(set(costs)) == 5
    assert work_of(spec("args", k=4)) < costs[2]
