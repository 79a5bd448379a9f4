"""What an evaluation has to do: a file of records for each method, checked, and what it lacks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.config import EvalConfig, MethodSpec, SetupSpec
from ..evaluation.models import LoadedModels
from ..evaluation.results import records_path
from ..evaluation.work import EvalWorker, Task
from ..jobs.prompt_file import PromptEntry, digest_prompts
from ..jobs.record_file import OutputRefused, RecordFile
from ..jobs.resume import Earlier, check_models, check_stated, read_earlier
from ..jobs.settings import fingerprint_model, fingerprint_reward, make_settings


@dataclasses.dataclass
class EvalJob:
    """One method of one set-up: its file, and what is there already."""

    key: tuple[int, int]
    setup: SetupSpec
    method: MethodSpec
    file: RecordFile
    entries: list[PromptEntry]
    earlier: Earlier
    stated: dict[str, Any]
    fingerprint: str = ""

    @property
    def label(self) -> str:
        return f"{self.setup.name}/{self.method.name}"


def check_no_others(config: EvalConfig, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder with records of methods that are not in the configuration.

    They would be another evaluation's; starting again removes them.
    """
    own = {records_path(output, setup, m) for setup in config.setups for m in setup.methods}
    others = sorted(set(output.glob("records/*/*.jsonl")) - own)
    if others and not overwrite:
        named = ", ".join(f"{path.parent.name}/{path.stem}" for path in others[:5])
        named += ", ..." if len(others) > 5 else ""
        raise OutputRefused(
            f"output {str(output)!r} holds records of methods that this configuration has not: "
            f"{named}. Choose another output, or --overwrite to start again"
        )
    for path in others:
        path.unlink()
        path.with_name(path.name + ".settings.json").unlink(missing_ok=True)


def open_jobs(
    config: EvalConfig,
    prompts: Sequence[PromptEntry],
    output: Path,
    stack: contextlib.ExitStack,
    *,
    overwrite: bool,
    retry_errors: bool,
) -> list[EvalJob]:
    """Open every file of records and check, before any model is loaded, that it may go on."""
    digest = digest_prompts(list(prompts))
    jobs = []
    for i, setup in enumerate(config.setups):
        for j, method in enumerate(setup.methods):
            path = records_path(output, setup, method)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputRefused(
                    f"output {str(output)!r} cannot be written: {error.strerror}"
                ) from error
            file = stack.enter_context(RecordFile(path))
            entries = [
                dataclasses.replace(prompt, index=seed_idx * len(prompts) + prompt.index)
                for seed_idx in range(len(config.seeds))
                for prompt in prompts
            ]
            earlier = Earlier()
            stated = _stated(config, setup, method, digest, len(prompts))
            if not overwrite:
                earlier = read_earlier(file, entries, retry_errors=retry_errors)
                check_stated(file, earlier, stated)
            jobs.append(EvalJob((i, j), setup, method, file, entries, earlier, stated))
    return jobs


def _stated(
    config: EvalConfig, setup: SetupSpec, method: MethodSpec, digest: str, count: int
) -> dict[str, Any]:
    """Everything that the configuration says about the records of a method."""
    scored_by = {role: setup.models.get(role) for role in ("reward", "gold", "judge", "embedder")}
    stated = {
        "method": method.method,
        **dict(method.own),
        **{k: v for k, v in dataclasses.asdict(method.config(0)).items() if k != "seed"},
        "seeds": list(config.seeds),
        **{f"scored by {role}": source and str(source) for role, source in scored_by.items()},
        "chat": config.prompts.chat,
        "traces": config.traces,
        "number of prompts": count,
        "prompts": digest,
    }
    # As they look when they are read back.
    return json.loads(json.dumps(stated))


def check_job(job: EvalJob, worker: EvalWorker) -> None:
    """Load what a method needs, try it on no prompt, and settle what its file holds."""
    worker.models_of(job.setup)
    worker.check(job.method)
    settings = make_settings(job.stated, _model_settings(job, worker.models_of(job.method)))
    check_models(job.file, job.earlier, settings)
    job.fingerprint = settings["fingerprint"]
    job.file.keep(sorted(job.earlier.kept.values(), key=lambda line: line.start))
    job.file.write_settings(settings)


def _model_settings(job: EvalJob, loaded: LoadedModels) -> dict[str, Any]:
    """Name and fingerprint of each model by role; a function has its name alone."""
    settings = {}
    for role, model in loaded.languages.items():
        settings[role] = {"fingerprint": fingerprint_model(model, loaded.tokenizer)}
    for role, reward in loaded.rewards.items():
        settings[role] = {"fingerprint": fingerprint_reward(reward)}
    return {
        role: {"name": str(job.method.models[role]), **found} for role, found in settings.items()
    }


def tasks_of(config: EvalConfig, job: EvalJob) -> list[Task]:
    """Groups of prompts that have no record yet, none across two seeds."""
    count = len(job.entries) // len(config.seeds)
    tasks = []
    for seed_idx, seed in enumerate(config.seeds):
        left = [i for i in range(count) if seed_idx * count + i not in job.earlier.kept]
        for start in range(0, len(left), config.batch_size):
            group = tuple(left[start : start + config.batch_size])
            tasks.append(Task(*job.key, seed, seed_idx, group))
    return tasks
