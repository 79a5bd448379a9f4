"""What is asked of Ray, and what is refused before it starts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.decode_job import Job
from tests.cli.test_app import NEEDED, invoke
from tq_fast.cli import decode as decode_command
from tq_fast.cli import evaluate as eval_command
from tq_fast.errors import InvalidArgument
from tq_fast.ray import decode_dataset
from tq_fast.ray.cluster import Cluster, may_use_gpus


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"workers": 1.5}, "workers must be an integer of at least 1, got 1.5"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be an integer of at least 1, got 0"),
        ({"gpus_per_worker": -1}, "gpus_per_worker must be a number of at least 0, got -1"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker above 1 must be whole, got 1.5"),
        ({"gpus_per_worker": float("nan")}, "gpus_per_worker must be a number of at least 0"),
        ({"address": ""}, "ray must be the address of a cluster, got ''"),
    ],
)
def test_wrong_numbers_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        Cluster(**values)


@pytest.mark.parametrize(
    ("asked", "has", "workers", "gpus"),
    [
        ({}, {"CPU": 8.0}, 8, 0.0),
        ({"cpus_per_worker": 3}, {"CPU": 8.0}, 2, 0.0),
        ({}, {"CPU": 8.0, "GPU": 2.0}, 2, 1.0),
        ({"gpus_per_worker": 0.5}, {"CPU": 8.0, "GPU": 2.0}, 4, 0.5),
        ({"gpus_per_worker": 0}, {"CPU": 8.0, "GPU": 2.0}, 8, 0),
        # More workers than there is room for now: a cluster may grow.
        ({"workers": 5}, {"CPU": 8.0, "GPU": 2.0}, 5, 1.0),
    ],
)
def test_what_is_not_given_follows_from_the_cluster(
    asked: dict[str, Any], has: dict[str, float], workers: int, gpus: float
) -> None:
    settled = Cluster(**asked).settle(has, may_use_gpus=True)
    assert (settled.workers, settled.gpus_per_worker) == (workers, gpus)


def test_no_room_for_one_worker_is_refused() -> None:
    message = "gpus_per_worker=1 are more than the cluster has: 4 CPUs and 0 GPUs"
    with pytest.raises(InvalidArgument, match=message):
        Cluster(gpus_per_worker=1).settle({"CPU": 4.0}, may_use_gpus=True)


@pytest.mark.parametrize(
    ("device", "answer"),
    [
        (None, True),
        ("cpu", False),
        ("cuda:1", True),
        ({"baseline": "cuda", "reward": "cpu"}, True),
        ({"baseline": "cpu", "reward": "cpu"}, False),
    ],
)
def test_models_on_the_cpu_ask_for_no_gpu(device: Any, answer: bool) -> None:
    assert may_use_gpus(device) == answer


def test_without_ray_workers_are_refused_and_the_extra_is_named(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name)
    )
    message = r"decoding in workers needs Ray, which is not installed: pip install 'tq-fast\[ray\]'"
    with pytest.raises(InvalidArgument, match=message):
        job.run(cluster=Cluster(workers=2))
    with pytest.raises(InvalidArgument, match=r"decode_dataset needs Ray.*'tq-fast\[ray\]'"):
        decode_dataset([], baseline="b", reward="r")
    assert not job.output.exists()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The workers that a command asked for, instead of running it."""
    seen: dict[str, Any] = {}

    def note(*arguments: Any) -> int:
        (options,) = [a for a in arguments if hasattr(a, "overwrite")]
        seen["cluster"] = options.cluster
        return 0

    monkeypatch.setattr(decode_command, "run_decode", note)
    monkeypatch.setattr(eval_command, "run_eval", note)
    return seen


@pytest.mark.parametrize(
    ("words", "cluster"),
    [
        ("", None),
        ("--workers 1", None),
        ("--workers 3", Cluster(workers=3)),
        ("--ray", Cluster(address="auto")),
        ("--ray --workers 3", Cluster(workers=3, address="auto")),
        ("--ray 10.0.0.1:6379", Cluster(address="10.0.0.1:6379")),
        (
            "--workers 2 --gpus-per-worker 0.5 --cpus-per-worker 4",
            Cluster(workers=2, gpus_per_worker=0.5, cpus_per_worker=4),
        ),
    ],
)
def test_the_options_of_decode_ask_for_workers(
    seen: dict, words: str, cluster: Cluster | None
) -> None:
    result = invoke(*NEEDED, *words.split())
    assert result.exit_code == 0, result.output
    assert seen == {"cluster": cluster}


def test_processes_of_an_evaluation_are_rays_only_where_it_is_named(
    seen: dict, tmp_path: Path
) -> None:
    words = ["eval", "tiny", "--output", str(tmp_path), "--workers", "2"]
    assert invoke(*words).exit_code == 0 and seen == {"cluster": None}
    assert invoke(*words, "--ray").exit_code == 0
    assert seen == {"cluster": Cluster(address="auto")}


def test_what_workers_get_is_refused_without_workers(seen: dict) -> None:
    result = invoke(*NEEDED, "--gpus-per-worker", "1")
    assert isinstance(result.exception, InvalidArgument) and not seen
    assert "gpus_per_worker=1.0" in str(result.exception)
