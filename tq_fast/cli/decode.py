"""`tq-fast decode`: a file of prompts in, one JSON record a prompt out, resumable at any moment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import presets
from ..config import DecodeConfig
from ..errors import InvalidArgument
from ..jobs.resume import ModelChoice
from .job import JobOptions, open_job


def choose_models(
    method: str | None,
    config: DecodeConfig,
    models: Mapping[str, Any],
    own: Mapping[str, Any],
    explicit: Collection[str] = (),
) -> ModelChoice:
    """Return the method and the models that a command line names.

    Args:
        method: name of the preset; None: Transfer Q*.
        config: settings.
        models: fields of `ModelChoice`, and `baseline` as a list of names or None.
        own: settings of the method's own that were given.
        explicit: fields of the configuration that were given, be it with their default.

    Raises:
        InvalidArgument: there is no such method, or it takes one baseline and several were given.
    """
    others, baselines = dict(models), models["baseline"] or []
    del others["baseline"]
    choice = ModelChoice(**others, method=method)
    name = choice.method_name(config)
    known = presets.own_settings(name)
    # A setting of the method's own that is a field of the configuration too has a default of its
    # own, so that the configuration's must be told from one that was asked for.
    named = {field: getattr(config, field) for field in explicit if field in known}
    one: str | None = None
    if "baselines" in known:
        named["baselines"] = tuple(baselines)
    elif len(baselines) > 1:
        raise InvalidArgument(
            f"baseline must be one model for the method {name!r}, got {', '.join(baselines)}"
        )
    else:
        one = next(iter(baselines), None)
    return ModelChoice(**others, baseline=one, method=method, own={**named, **own})


def run_decode(
    config: DecodeConfig,
    models: ModelChoice,
    prompts: str,
    output: Path,
    options: JobOptions,
    console: Console,
) -> int:
    """Decode every prompt that has no record in `output` yet.

    Arguments and errors are those of `open_job`, the exit code is that of `DecodeJob.run`.
    """
    with open_job(config, models, prompts, output, options, console) as job:
        return job.run()
