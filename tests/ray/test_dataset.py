"""`tq_fast.ray.decode_dataset`: the rows of a Ray data set, as one process decodes them."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from typing import Any

import pytest

from tests.cli.decode_job import CONFIG, Job
from tests.cli.trio import MAX_POSITIONS, Trio
from tests.ray.conftest import assert_same, read_records
from tq_fast.errors import InvalidArgument
from tq_fast.ray import decode_dataset
from tq_fast.results import Certificate

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# Some prompts are equal, in different forms too; one is too long.
TEXTS = ["a b", "c", "a b", "d e f", "a  b", "c", "a " * MAX_POSITIONS, "a b"]


@pytest.fixture
def wanted(job: Job) -> list[dict[str, Any]]:
    """The records of a job in this process."""
    job.write_prompts(TEXTS)
    assert job.run(traces=True) == 1
    return read_records(job.output)


def _options(trio: Trio) -> dict[str, Any]:
    roles = ("baseline", "sft", "reward")
    return {"config": CONFIG, "workers": 2, **{role: str(getattr(trio, role)) for role in roles}}


def _check_rows(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Rows hold what the records do; what a record lacks is null."""
    assert sorted(row["index"] for row in rows) == [record["index"] for record in wanted]
    for row, record in zip(sorted(rows, key=lambda row: row["index"]), wanted, strict=True):
        assert row["prompt"] == record["prompt"] and row["number"] == record["index"]
        names = ("response", "token_ids", "steps", "certificate", "error", "trace")
        for name in names:
            assert_same(_plain(row[name]), _filled(record.get(name), row[name]), name)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _filled(value: Any, like: Any) -> Any:
    """`value` with null for the fields that `like` has beside it."""
    if isinstance(value, dict):
        return {name: _filled(value.get(name), like[name]) for name in like}
    if isinstance(value, list):
        return [_filled(part, other) for part, other in zip(value, like, strict=True)]
    return value


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 5])
def test_rows_are_those_of_one_process_whatever_the_blocks(
    ray_here: Any, trio: Trio, wanted: list[dict[str, Any]], num_blocks: int
) -> None:
    given = [{"prompt": text, "number": i} for i, text in enumerate(TEXTS)]
    ds = ray_here.data.from_items(given, override_num_blocks=num_blocks)
    answer = decode_dataset(ds, traces=True, batch_size=2, **_options(trio))
    rows = answer.take_all()
    assert set(rows[0]) == {
        *("prompt", "number", "index", "response", "token_ids", "steps", "certificate"),
        *("stages", "trace", "other_responses", "error"),
    }
    assert set(rows[0]["certificate"]) == {f.name for f in dataclasses.fields(Certificate)}
    _check_rows(rows, wanted)
    if num_blocks == 5:
        # The rest of a run: equal prompts that were answered before still count.
        left = decode_dataset(ds, traces=True, done=[0, 1, 6], **_options(trio)).take_all()
        _check_rows(left, [record for record in wanted if record["index"] not in (0, 1, 6)])


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_row(
    ray_here: Any, trio: Trio, wanted: list[dict[str, Any]]
) -> None:
    psutil = pytest.importorskip("psutil")
    given = [{"prompt": text, "number": i} for i, text in enumerate(TEXTS)]
    answer = decode_dataset(
        ray_here.data.from_items(given), traces=True, batch_size=1, **_options(trio)
    )
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            for process in psutil.Process().children(recursive=True):
                if not killed and "MapWorker" in process.name():
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    rows = answer.take_all()
    assert len(killed) == 1
    _check_rows(rows, wanted)


@pytest.mark.slow
def test_chats_come_back_and_nulls_of_messages_are_left_out(ray_here: Any, trio: Trio) -> None:
    chats = [
        [{"role": "user", "content": "a b"}],
        [{"role": "user", "content": "c", "name": "d"}, {"role": "assistant", "content": "e"}],
    ]
    ds = ray_here.data.from_items([{"messages": chat} for chat in chats])
    rows = decode_dataset(ds, **_options(trio)).take_all()
    assert [row["error"] for row in rows] == [None, None]
    assert all(len(row["token_ids"]) == CONFIG.max_new_tokens for row in rows)
    assert all("trace" not in row for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"alhpa": 2.0}, "alhpa is no option of decode_dataset; did you mean 'alpha'?"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"method": "best"}, "method 'best' is unknown; did you mean 'best_of_n'?"),
        ({"n": 3}, "n is no option of decode_dataset"),
        ({"method": "args", "horizon": 3}, "horizon is 0 for the method 'args', got 3"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_wrong_arguments_are_refused_before_a_worker_starts(
    ray_here: Any, trio: Trio, changes: dict[str, Any], message: str
) -> None:
    ds = ray_here.data.from_items([{"prompt": "a"}])
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        decode_dataset(ds, **{**_options(trio), "config": None, **changes})


def test_models_that_are_loaded_already_are_refused_by_role(ray_here: Any, trio: Trio) -> None:
    import torch

    ds = ray_here.data.from_items([{"prompt": "a"}])
    with pytest.raises(InvalidArgument, match="reward must be a folder, a hub id or a function"):
        decode_dataset(ds, **{**_options(trio), "reward": torch.nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "ds must have a column 'prompt' or 'messages'; it has 'text'"),
        ([{"prompt": "a", "steps": 1}], "ds has the columns 'steps', which the answer has"),
    ],
)
def test_wrong_columns_are_refused_by_name(
    ray_here: Any, trio: Trio, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        decode_dataset(ray_here.data.from_items(rows), **_options(trio))
    with pytest.raises(InvalidArgument, match=r"ds must be a ray.data.Dataset, got list"):
        decode_dataset(rows, **_options(trio))


@pytest.mark.slow
def test_a_prompt_of_a_wrong_form_is_refused_by_its_row(ray_here: Any, trio: Trio) -> None:
    ds = ray_here.data.from_items([{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(InvalidArgument, match="ds, row 1 must have one of the keys"):
        decode_dataset(ds, **_options(trio))
