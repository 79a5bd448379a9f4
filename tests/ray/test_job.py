"""`tq-fast decode` in workers: the records of one process, whoever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tq_fast
from tests.cli.decode_job import CONFIG, Job
from tests.cli.trio import Trio
from tests.ray.conftest import assert_same, read_records
from tq_fast import DecodeConfig
from tq_fast.errors import InvalidArgument, TqFastError
from tq_fast.jobs.record_file import OutputRefused, RecordFile
from tq_fast.models.tiny import load_tiny_world
from tq_fast.ray.cluster import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TWO = Cluster(workers=2)
# A reward that meets trouble where the word is in the prompt.
REWARD = """
import os, pathlib, torch

def die(prompts, responses):
    if any("c" == prompt for prompt in prompts):
        os._exit(1)
    return [float(len(response)) for response in responses]

def lose_device_once(prompts, responses):
    marker = pathlib.Path(__file__).with_suffix(".lost")
    if any("c" == prompt for prompt in prompts) and not marker.exists():
        marker.touch()
        raise torch.AcceleratorError("the device is lost")
    return [float(len(response)) for response in responses]

def plain(prompts, responses):
    return [float(len(response)) for response in responses]
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, trio: Trio) -> Job:
    """40 prompts for the embedded models, decoded in this process; some are equal, one is wrong."""
    job = _tiny_job(tmp_path_factory.mktemp("tiny"), trio)
    assert job.run(TINY_CONFIG, traces=True) == 1
    return job


# Roll-outs by arg max: rounding, which differs with the batch, hardly ever decides between tokens.
TINY_CONFIG = DecodeConfig(k=5, horizon=10, max_new_tokens=12)


def _tiny_job(folder: Path, trio: Trio) -> Job:
    world = load_tiny_world()
    texts = [*world.prompts[:24], "", *world.prompts[:15]]
    job = Job(folder, trio, texts)
    roles = ("baseline", "sft", "reward")
    job.models = type(job.models)(**{role: str(getattr(world, role)) for role in roles})
    return job


@pytest.mark.slow
def test_two_workers_write_the_records_of_one_process(
    ray_here: Any, job: Job, tiny: Job, trio: Trio, tmp_path: Path
) -> None:
    found = _tiny_job(tmp_path, trio)
    assert found.run(TINY_CONFIG, traces=True, cluster=TWO) == 1
    assert_same(read_records(found.output), read_records(tiny.output))
    assert "39 of 40 prompts have a response" in found.said
    assert "1 failed (index 24)" in found.said
    # Nothing is left to do for one process either: the settings are the same.
    assert found.run(TINY_CONFIG, traces=True) == 1
    assert "nothing was left to do" in found.said


def test_a_worker_killed_five_times_loses_no_record(
    ray_here: Any, tiny: Job, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil = pytest.importorskip("psutil")
    append, num_written, killed = RecordFile.append, 0, []

    def append_and_kill(file: RecordFile, record: dict[str, Any]) -> None:
        nonlocal num_written
        append(file, record)
        num_written += 1
        if len(killed) < 5 and num_written >= 4 * (len(killed) + 1):
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.name().startswith("ray::_Host.run") and process.pid not in killed
            ]
            if workers:
                killed.append(workers[0].pid)
                os.kill(workers[0].pid, signal.SIGKILL)

    monkeypatch.setattr(RecordFile, "append", append_and_kill)
    found = _tiny_job(tmp_path, trio)
    assert found.run(TINY_CONFIG, traces=True, batch_size=2, cluster=TWO) == 1
    assert len(set(killed)) == 5
    assert found.said.count("a worker died; what it had not finished") >= 5
    assert_same(read_records(found.output), read_records(tiny.output))


@pytest.mark.slow
def test_killed_in_two_workers_it_goes_on_to_the_same_end_and_leaves_no_process(
    ray_here: Any, tiny: Job, trio: Trio, tmp_path: Path
) -> None:
    found = _tiny_job(tmp_path, trio)
    models = vars(found.models)
    words = [word for role in ("baseline", "sft", "reward") for word in ("--" + role, models[role])]
    words += ["--k", "5", "--horizon", "10", "--max-new-tokens", "12"]
    words += ["--traces", "--batch-size", "2", "--workers", "2"]
    command = [sys.executable, "-m", "tq_fast", "decode", *words]
    command += ["--prompts", str(found.prompts), "--output", str(found.output)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(tq_fast.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not found.output.exists() or found.output.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    ours = [p for p in _descendants(process.pid) if p.name().startswith("ray::_Host")]
    assert len(ours) == 2
    with pytest.raises(OutputRefused, match="is being written by another process"):
        RecordFile(found.output).__enter__()
    process.kill()
    process.wait()
    at_death = found.output.read_bytes()
    early = at_death[: at_death.rindex(b"\n") + 1]
    assert found.run(TINY_CONFIG, traces=True, cluster=TWO) == 1
    assert "resuming: " in found.said
    assert found.output.read_bytes().startswith(early), "a finished record was touched"
    assert_same(read_records(found.output), read_records(tiny.output))
    deadline = time.monotonic() + 60
    while alive := [process for process in ours if _is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def _is_alive(process: Any) -> bool:
    psutil = pytest.importorskip("psutil")
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants(pid: int) -> list[Any]:
    psutil = pytest.importorskip("psutil")
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def troubled(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, str]]:
    """Makes the reward one of the functions above, found in the folder of the command."""
    name = f"reward_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda function: {"reward": f"{name}:{function}"}


@pytest.mark.slow
def test_a_prompt_that_brings_workers_down_becomes_an_error_record(
    ray_here: Any, job: Job, troubled: Callable
) -> None:
    job.write_prompts(["a b", "c", "d e f"])
    assert job.run(models=troubled("die"), cluster=Cluster(workers=1)) == 1
    found = job.records()
    assert found[1]["error"] == {
        "type": "WorkerLost",
        "message": "3 workers in turn died while they decoded it alone",
    }
    job.output.unlink()
    assert job.run(models=troubled("plain")) == 0
    for index in (0, 2):
        assert_same(found[index]["token_ids"], job.records()[index]["token_ids"])


@pytest.mark.slow
def test_a_worker_that_lost_its_device_begins_again(
    ray_here: Any, job: Job, troubled: Callable
) -> None:
    assert job.run(models=troubled("lose_device_once"), cluster=Cluster(workers=1)) == 0
    assert job.said.count("a worker died") == 1
    found = job.responses()
    job.output.unlink()
    assert job.run(models=troubled("plain")) == 0
    assert found == job.responses()


@pytest.mark.slow
def test_workers_that_die_while_they_load_end_the_job(
    ray_here: Any, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dead_at_import.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TqFastError, match="3 workers in turn died while they loaded the models"):
        job.run(models={"reward": "dead_at_import:score"}, cluster=Cluster(workers=1))
    assert not job.output.exists()


@pytest.mark.slow
def test_what_a_worker_refuses_is_said_in_its_own_words(ray_here: Any, job: Job) -> None:
    with pytest.raises(InvalidArgument, match=r"^baseline='/nowhere': there is no such folder$"):
        job.run(models={"baseline": "/nowhere"}, cluster=TWO)
    with pytest.raises(InvalidArgument, match="beta is needed by the method"):
        job.run(models={"method": "transfer_q_indirect"}, cluster=TWO)
    assert not job.output.exists()


@pytest.mark.slow
def test_another_model_on_resume_is_refused(ray_here: Any, job: Job, trio: Trio) -> None:
    assert job.run() == 0
    before = job.output.read_bytes()
    with pytest.raises(OutputRefused, match=r"reward was '.*/reward', is '.*/other_reward'"):
        job.run(models={"reward": str(trio.other_reward)}, cluster=TWO)
    assert job.output.read_bytes() == before
    assert job.run(cluster=Cluster(workers=1)) == 0
    assert "nothing was left to do" in job.said


@pytest.mark.slow
def test_several_responses_and_texts_of_best_of_n_come_back(ray_here: Any, job: Job) -> None:
    models = {"method": "best_of_n", "own": {"n": 3}}
    assert job.run(models=models) == 0
    wanted = read_records(job.output)
    assert job.run(models=models, overwrite=True, cluster=TWO) == 0
    assert_same(read_records(job.output), wanted)
    assert all(len(record["stages"][0]["sequences"]) == 3 for record in wanted)
    assert json.loads(job.output.with_name("out.jsonl.settings.json").read_text())["models"]
    assert CONFIG.num_return_sequences == 1
