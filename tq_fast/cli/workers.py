"""Options of the commands that may decode in many processes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from ..ray.cluster import Cluster


def _workers(*names: str, help: str, metavar: str) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Workers")


Workers = Annotated[
    int | None,
    _workers(
        "--workers",
        help="Processes that decode, each with models of its own, by Ray (the extra `ray`). "
        "Default: this process; with --ray, as many as there is room for.",
        metavar="N",
    ),
]
RayAddress = Annotated[
    str | None,
    _workers(
        "--ray",
        help="Workers run on this Ray cluster (the extra `ray`); without an address, on the one "
        "that this machine belongs to. Default: on this machine.",
        metavar="[ADDRESS]",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    _workers(
        "--gpus-per-worker",
        help="GPUs of a worker, or a share of one. Default: one where there are any.",
        metavar="X",
    ),
]
CpusPerWorker = Annotated[
    int | None,
    _workers(
        "--cpus-per-worker", help="CPUs of a worker, and its threads. Default: 1.", metavar="N"
    ),
]


class RayCommand(TyperCommand):
    """A command whose option --ray may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args`, with Ray's own word for the running cluster where no address is given."""
        whole = []
        for arg, following in itertools.zip_longest(args, args[1:], fillvalue="-"):
            is_bare = arg == "--ray" and following.startswith("-")
            whole += [arg, "auto"] if is_bare else [arg]
        return super().parse_args(ctx, whole)


def read_cluster(
    workers: int | None, ray: str | None, gpus_per_worker: float | None, cpus_per_worker: int | None
) -> Cluster | None:
    """Return the workers that the options ask for; None: the calling process decodes.

    Raises:
        InvalidArgument: a value is wrong, or says something of workers that are not there.
    """
    from ..ray.cluster import LOCAL, Cluster

    cluster = Cluster(
        workers=workers,
        address=LOCAL if ray is None else ray,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=1 if cpus_per_worker is None else cpus_per_worker,
    )
    if ray is not None or (workers or 1) > 1:
        return cluster
    for name, value in (("gpus", gpus_per_worker), ("cpus", cpus_per_worker)):
        if value is not None:
            raise InvalidArgument(
                f"{name}_per_worker={value} is for workers: give --workers above 1, or --ray"
            )
    return None
