"""What is asked of Ray: where it runs, how many workers, and what each of them gets."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import is_real
from ..errors import InvalidArgument

# Ray's own words for the address of a new cluster on this machine, and of the one that runs here.
LOCAL = "local"
RUNNING = "auto"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Workers, each with models of its own, and where they run.

    Attributes:
        workers: number of processes; None: as many as there is room for.
        address: of a Ray cluster; "auto" is the one that this machine belongs to, "local" a new one
            on this machine, which ends with the job.
        gpus_per_worker: GPUs of a worker, or a share of one; None: one where the cluster has GPUs
            and the models may run on them.
        cpus_per_worker: CPUs of a worker, and its threads.

    Raises:
        InvalidArgument: a value is wrong.
    """

    workers: int | None = None
    address: str = LOCAL
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if not (is_int and value >= 1) and not (name == "workers" and value is None):
                raise InvalidArgument(f"{name} must be an integer of at least 1, got {value!r}")
        gpus = self.gpus_per_worker
        if gpus is not None and not (is_real(gpus) and 0 <= gpus < math.inf):
            raise InvalidArgument(f"gpus_per_worker must be a number of at least 0, got {gpus!r}")
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise InvalidArgument(f"gpus_per_worker above 1 must be whole, got {gpus!r}")
        if not isinstance(self.address, str) or not self.address:
            raise InvalidArgument(f"ray must be the address of a cluster, got {self.address!r}")

    def describe(self) -> str:
        """Say who decodes, for messages."""
        count = "the workers" if self.workers is None else f"{self.workers} workers"
        return f"{count} of Ray ({self.address})"

    def alone(self) -> Cluster:
        """Return the same with one worker."""
        return dataclasses.replace(self, workers=1)

    def settle(self, has: Mapping[str, float], *, may_use_gpus: bool) -> Cluster:
        """Return the same with every number, for a cluster that has the resources `has`.

        Args:
            has: CPUs and GPUs in all, as Ray counts them.
            may_use_gpus: whether the models run on a GPU if there is one.

        Raises:
            InvalidArgument: there is no room for one worker.
        """
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if may_use_gpus and has.get("GPU", 0) else 0.0
        room = int(has.get("CPU", 0) // self.cpus_per_worker)
        if gpus:
            room = min(room, int(has.get("GPU", 0) / gpus))
        if not room:
            raise InvalidArgument(
                f"cpus_per_worker={self.cpus_per_worker} and gpus_per_worker={gpus:g} are more "
                f"than the cluster has: {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
            )
        workers = room if self.workers is None else self.workers
        return dataclasses.replace(self, workers=workers, gpus_per_worker=gpus)


def may_use_gpus(device: Any) -> bool:
    """Return whether the argument `device` leaves a GPU to some model."""
    named = device.values() if isinstance(device, Mapping) else [device]
    return any(name is None or str(name).startswith("cuda") for name in named)


def require_ray(needed_by: str) -> None:
    """Refuse to go on without Ray.

    Raises:
        InvalidArgument: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise InvalidArgument(
            f"{needed_by} needs Ray, which is not installed: pip install 'tq-fast[ray]'"
        )


@contextlib.contextmanager
def connect(cluster: Cluster, *, may_use_gpus: bool) -> Iterator[Cluster]:
    """Connect to Ray, or start it here; yield what is asked of it, with every number.

    A connection that this process has already is used as it is, and is left open.

    Raises:
        InvalidArgument: Ray is not installed, the cluster cannot be reached, or it has no room for
            a worker.
    """
    require_ray("decoding in workers")
    import ray

    if ray.is_initialized():
        yield cluster.settle(ray.cluster_resources(), may_use_gpus=may_use_gpus)
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if cluster.address == LOCAL:
            # Nothing is sent to anybody by a cluster that we start.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            num_cpus = max(os.cpu_count() or 1, (cluster.workers or 1) * cluster.cpus_per_worker)
            ray.init(LOCAL, num_cpus=num_cpus, include_dashboard=False, **quiet)
        else:
            ray.init(cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InvalidArgument(f"ray={cluster.address!r} cannot be reached: {error}") from error
    try:
        yield cluster.settle(ray.cluster_resources(), may_use_gpus=may_use_gpus)
    finally:
        ray.shutdown()
