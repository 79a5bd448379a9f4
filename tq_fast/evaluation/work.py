"""The work of an evaluation.

Each method of each set-up has a job: a file of records, and the prompts that it lacks. Its tasks
are groups of those prompts; a worker decodes and measures them (`processes.py` says where).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import presets
from ..errors import InvalidArgument
from ..forest.language import vocab_size_of
from ..jobs.prompt_file import PromptEntry, digest_prompts
from ..jobs.record_file import OutputRefused, Record, RecordFile
from ..jobs.records import ends_the_job, error_record, finite, record_head, response_record
from ..jobs.resume import (
    Earlier,
    check_models,
    check_stated,
    check_version,
    fingerprint_models,
    make_settings,
    read_earlier,
)
from ..models.fingerprint import fingerprint_file
from ..prompts import Prompt, PromptReader
from ..results import DecodeResult, PromptResult
from .config import EvalConfig, MethodSpec, SetupSpec
from .measures import measure_responses
from .methods import all_settings
from .models import LoadedModels, ModelPool
from .results import records_path

# Texts of a pool that are drawn together, at least.
_POOL_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts that are decoded together by one method with one seed.

    Attributes:
        setup: position of the set-up.
        method: position of the method in it.
        seed: of the decode.
        seed_idx: position of the seed.
        prompts: positions of the prompts.
    """

    setup: int
    method: int
    seed: int
    seed_idx: int
    prompts: tuple[int, ...]


class EvalWorker:
    """Decodes and measures groups of prompts.

    Args:
        config: what is evaluated.
        entries: every prompt.
        pool: models that are loaded already; None: none are.
    """

    def __init__(
        self,
        config: EvalConfig,
        entries: Sequence[PromptEntry],
        pool: ModelPool | None = None,
    ) -> None:
        self.config = config
        self.entries = entries
        self.pool = ModelPool() if pool is None else pool
        self._read: dict[Any, list[Prompt | Exception]] = {}

    def models_of(self, spec: SetupSpec | MethodSpec) -> LoadedModels:
        """Return the loaded models of a set-up or a method."""
        return self.pool.load(spec.models)

    def check(self, method: MethodSpec) -> None:
        """Try a method on no prompt: refuse what its preset refuses, before any forward pass."""
        self._call(method, [], self.config.seeds[0])

    def run(self, task: Task) -> Iterator[Record]:
        """Iterate over the records of the prompts of `task`, as far as they are finished."""
        setup = self.config.setups[task.setup]
        prompts = self._prompts(setup.jobs[task.method])
        group: dict[int, Prompt] = {}
        for idx in task.prompts:
            prompt = prompts[idx]
            if isinstance(prompt, Exception):
                yield self.error(task, idx, prompt)
            else:
                group[idx] = prompt
        if group:
            yield from self._run_group(task, group)

    def _run_group(self, task: Task, group: dict[int, Prompt]) -> Iterator[Record]:
        """Decode `group` together; if that fails, its halves, down to the prompt that fails."""
        records = None
        try:
            records = self._decode(task, group)
        except Exception as error:
            if ends_the_job(error):
                raise
            if len(group) == 1:
                records = [self.error(task, next(iter(group)), error)]
        if records is not None:
            yield from records
            return
        # The halves run after the except block: the error, whose traceback holds memory, is gone.
        middle = (len(group) + 1) // 2
        items = list(group.items())
        for half in (items[:middle], items[middle:]):
            yield from self._run_group(task, dict(half))

    def _decode(self, task: Task, group: dict[int, Prompt]) -> list[Record]:
        setup = self.config.setups[task.setup]
        method = setup.jobs[task.method]
        if method.is_pool:
            return self._draw_pool(task, method, group)
        prompts = list(group.values())
        start, cpu_start = time.perf_counter(), time.process_time()
        result = self._call(method, prompts, task.seed)
        spent = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
        }
        models = self.models_of(setup)
        measures = measure_responses(prompts, result, models, **spent)
        records = []
        for i, idx in enumerate(group):
            trace = result.traces[i]
            text = None if result.texts is None else result.texts[i]
            stages = result.stages[i]
            one = PromptResult(text, result.sequences[i], trace, result.certificates[i], stages)
            is_first = task.seed_idx == 0 and idx < self.config.traces
            # Methods without values choose among one candidate: their traces say nothing more than
            # the response.
            keeps_trace = is_first and len(trace[0].candidates) > 1
            record = response_record(
                self._entry(task, idx), [one], traces=keeps_trace, texts=method.keeps_texts
            )
            if keeps_trace and models.tokenizer is not None:
                for step in record["trace"]:
                    step["texts"] = [models.tokenizer.decode([z]) for z in step["candidates"]]
            place = {"prompt_idx": idx, "seed": task.seed}
            records.append({**record, **place, "measures": finite(measures[i])})
        return records

    def _draw_pool(self, task: Task, pool: MethodSpec, group: dict[int, Prompt]) -> list[Record]:
        """Draw the pool of every prompt; its record holds all texts and their scores, in order."""
        result = self._call(pool, list(group.values()), task.seed)
        models = self.models_of(self.config.setups[task.setup])
        num_rows = _batch_size(pool, self.config)
        records = []
        for i, (idx, prompt) in enumerate(group.items()):
            drawn = result.sequences[i * pool.num_texts : (i + 1) * pool.num_texts]
            texts = [sequence.tolist() for sequence in drawn]
            scores = {
                role: finite(models.score_pool(role, prompt, texts, num_rows=num_rows))
                for role in models.rewards
            }
            place = {"prompt_idx": idx, "seed": task.seed}
            pooled = {"token_ids": texts, "scores": scores}
            records.append({**record_head(self._entry(task, idx)), **place, **pooled})
        return records

    def _call(self, method: MethodSpec, prompts: list[Prompt], seed: int) -> DecodeResult:
        with warnings.catch_warnings():
            # Every record measures the error of Q and the effective sample size, so that the
            # warnings about them would only repeat it.
            for message in (
                "the standard error of Q",
                "the weights of indirect",
                "transfer='indir",
            ):
                warnings.filterwarnings("ignore", message)
            arguments = {**self.models_of(method).preset_arguments(), **method.own}
            if method.value is not None:
                arguments["value"] = self.pool.head(method.value)
            if method.method == "collab" and "baselines" not in arguments:
                arguments["baselines"] = [arguments.pop("baseline")]
            return presets.METHODS[method.method](
                prompts,
                config=method.config(seed),
                batch_size=_batch_size(method, self.config),
                **arguments,
            )

    def _prompts(self, method: MethodSpec) -> list[Prompt | Exception]:
        """Return every prompt as the method's models read it, or why it cannot be read.

        All are read, so that equal ones have the random streams of a single call.
        """
        models = self.models_of(method)
        key = tuple(id(model) for model in models.languages.values())
        if key not in self._read:
            sizes = [vocab_size_of(model) for model in models.languages.values()]
            reader = PromptReader(models.tokenizer, vocab_size=min(sizes))
            self._read[key] = [self._read_one(reader, entry) for entry in self.entries]
        return self._read[key]

    def _read_one(self, reader: PromptReader, entry: PromptEntry) -> Prompt | Exception:
        given = entry.prompt
        if self.config.prompts.chat and isinstance(given, str):
            given = [{"role": "user", "content": given}]
        try:
            return reader.read(entry.index, given)
        except InvalidArgument as error:
            return error

    def _entry(self, task: Task, idx: int) -> PromptEntry:
        number = task.seed_idx * len(self.entries) + idx
        return dataclasses.replace(self.entries[idx], index=number)

    def error(self, task: Task, idx: int, error: Exception) -> Record:
        """Return the record of prompt `idx` of a task, which failed."""
        record = error_record(self._entry(task, idx), error)
        return {**record, "prompt_idx": idx, "seed": task.seed}


@dataclasses.dataclass
class EvalJob:
    """One method of one set-up, with its file of records.

    Attributes:
        key: positions of the set-up, and of the method in it.
        setup: the set-up.
        method: the method.
        file: its records.
        entries: every prompt under every seed, numbered through, one seed after the other.
        earlier: what the file held when the evaluation started.
        stated: everything that the configuration says about the records.
        fingerprint: of the settings, models included; goes into every record. Set by `check`.
    """

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
        """The name of the job in messages."""
        return f"{self.setup.name}/{self.method.name}"

    def check(self, worker: EvalWorker) -> None:
        """Load what the method needs, try it on no prompt, and settle what the file holds."""
        worker.models_of(self.setup)
        worker.check(self.method)
        loaded = worker.models_of(self.method)
        models = {**loaded.languages, **loaded.rewards}
        names = {role: str(self.method.models[role]) for role in models}
        fingerprints = fingerprint_models(models, names, loaded.tokenizer)
        if self.method.value is not None:
            contents = fingerprint_file(self.method.value / "model.safetensors")
            fingerprints["value"] = {"name": self.method.own["value"], "fingerprint": contents}
        settings = make_settings(self.stated, fingerprints)
        check_models(self.file, self.earlier, settings)
        self.fingerprint = settings["fingerprint"]
        self.file.keep(sorted(self.earlier.kept.values(), key=lambda line: line.start))
        self.file.write_settings(settings)

    def tasks(self, config: EvalConfig) -> list[Task]:
        """Return groups of prompts that have no record yet; each group has one seed."""
        seeds = self.method.seeds(config.seeds)
        count = len(self.entries) // len(seeds)
        # A prompt of a pool is a group by itself, which has many texts already.
        size = 1 if self.method.is_pool else config.batch_size
        tasks = []
        for seed_idx, seed in enumerate(seeds):
            left = [i for i in range(count) if seed_idx * count + i not in self.earlier.kept]
            for start in range(0, len(left), size):
                group = tuple(left[start : start + size])
                tasks.append(Task(*self.key, seed, seed_idx, group))
        return tasks


def check_no_others(config: EvalConfig, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder with records of methods that are not in the configuration.

    Such records belong to another evaluation; `overwrite` removes them.
    """
    own = {records_path(output, setup, m) for setup in config.setups for m in setup.jobs}
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
    mix_versions: bool,
) -> list[EvalJob]:
    """Open every file of records and check, before any model is loaded, that it may go on."""
    digest = digest_prompts(list(prompts))
    jobs = []
    for i, setup in enumerate(config.setups):
        for j, method in enumerate(setup.jobs):
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
                for seed_idx in range(len(method.seeds(config.seeds)))
                for prompt in prompts
            ]
            earlier = Earlier()
            stated = _stated(config, setup, method, digest, len(prompts))
            if not overwrite:
                earlier = read_earlier(file, entries, retry_errors=retry_errors)
                check_stated(file, earlier, stated)
            jobs.append(EvalJob((i, j), setup, method, file, entries, earlier, stated))
    is_done = all(len(job.earlier.kept) == len(job.entries) for job in jobs)
    # Tables compare all methods, so that no two versions may share the folder.
    check_version(output, [job.earlier for job in jobs], is_done=is_done, mix_versions=mix_versions)
    return jobs


def _stated(
    config: EvalConfig, setup: SetupSpec, method: MethodSpec, digest: str, count: int
) -> dict[str, Any]:
    """Return everything that the configuration says about the records of a method."""
    scored_by = {role: setup.models.get(role) for role in ("reward", "gold", "judge", "embedder")}
    stated = {
        "method": method.method,
        **{k: v for k, v in dataclasses.asdict(method.config(0)).items() if k != "seed"},
        # Some settings of a method have the name of a field, and win over it.
        **all_settings(method.method, method.own),
        "seeds": list(method.seeds(config.seeds)),
        **{f"scored by {role}": source and str(source) for role, source in scored_by.items()},
        "chat": config.prompts.chat,
        "traces": config.traces,
        "number of prompts": count,
        "prompts": digest,
    }
    # JSON makes lists of tuples: what is stated looks as it will when the file is read again.
    return json.loads(json.dumps(stated))


def _batch_size(method: MethodSpec, config: EvalConfig) -> int:
    """Return the prompts that a method decodes together; results do not depend on it."""
    # The texts of a pool are short work each, so that many of them go through one forward pass.
    return max(config.batch_size, _POOL_ROWS) if method.is_pool else config.batch_size
