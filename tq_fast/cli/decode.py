"""`tq-fast decode`: a file of prompts in, one JSON record a prompt out, resumable at any moment."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..config import DecodeConfig
from ..jobs.resume import ModelChoice
from .job import JobOptions, open_job


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
