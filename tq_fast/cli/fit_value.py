"""`tq-fast fit-value`: texts from a job of best_of_n, and the value head that foretells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..config import DecodeConfig, Role
from ..errors import InvalidArgument
from ..evaluation.models import score_responses
from ..jobs.decoding import EntryDecoder
from ..jobs.resume import model_settings
from ..jobs.texts import RecordedTexts, check_texts, read_texts
from ..presets.call import OpenMethod
from ..presets.fitting import FitPlan, LoggedTexts, fit_from_texts
from ..values.fitting import FitOptions
from ..values.head import ValueHead
from .decode import choose_models
from .job import JobOptions, open_job
from .terminal import INTERRUPTED, loading_models, say

# The fields of the configuration that say how texts are drawn; the others belong to the fit, and
# may change without the texts being drawn again.
_OF_FIT = ("alpha", "beta", "transfer")


@dataclasses.dataclass(frozen=True)
class FitJob:
    """What is fitted to which texts.

    Attributes:
        prompts: file of the prompts.
        from_records: records of an earlier job of best_of_n, in the place of `prompts`.
        output: folder of the head.
        source: the role whose model draws the texts.
        num_texts: texts a prompt and round.
        rounds: 2 adds texts that are drawn under the first head.
        epochs: passes over all tokens.
        reward_states: whether the head reads the reward model's states, too.

    Raises:
        InvalidArgument: there is neither a file of prompts nor one of records, or both.
    """

    prompts: str | None
    from_records: Path | None
    output: Path
    source: Role
    num_texts: int
    rounds: int
    epochs: int
    reward_states: bool = False

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.from_records is None):
            both = "neither" if self.prompts is None else "both"
            raise InvalidArgument(f"give prompts or from_records, got {both}")

    def plan(self, config: DecodeConfig) -> FitPlan:
        """Return what is fitted; a wrong value is refused before any model is loaded."""
        return FitPlan(
            transfer=config.transfer,
            beta=config.beta,
            rounds=self.rounds,
            alpha=config.alpha,
            num_texts=self.num_texts,
            reward_states=self.reward_states,
            options=FitOptions(epochs=self.epochs, seed=config.seed),
        )


def run_fit_value(
    config: DecodeConfig,
    models: Mapping[str, Any],
    job: FitJob,
    options: JobOptions,
    console: Console,
    results: Console,
) -> int:
    """Draw the texts that are missing, fit a head to all of them, and save it.

    Args:
        config: how texts are drawn, and alpha, beta and transfer of the fit.
        models: those of `choose_models`.
        job: what is fitted.
        options: how the job of the texts runs.
        console: for progress and messages.
        results: for the table of what the head knows.

    Returns:
        The exit code of the job that draws the texts; prompts that failed are left out.

    Raises:
        OutputRefused: the texts belong to another job.
        TqFastError: an argument is wrong.
    """
    plan = job.plan(config)
    if plan.transfer == "indirect" and (job.source != "baseline" or models.get("sft") is None):
        raise InvalidArgument(
            "transfer='indirect' weighs the texts of the baseline by the sft model: it needs "
            f"source='baseline' and sft, got source={job.source!r} and sft={models.get('sft')!r}"
        )
    drawing = dataclasses.replace(
        config, **{name: getattr(DecodeConfig(), name) for name in _OF_FIT}
    )
    own = {"n": job.num_texts, "source": job.source}
    choice = choose_models("best_of_n", drawing, models, own)
    _check_output(job.output)
    if job.from_records is not None:
        with loading_models(console):
            method = choice.load(drawing)
        settings = model_settings(method, choice)
        check_texts(job.from_records, settings, job.source)
        records = read_texts(job.from_records)
        return fit_and_save(method, records, plan, job.output, options, console, results)
    assert job.prompts is not None
    is_new = not job.output.exists()
    job.output.mkdir(parents=True, exist_ok=True)
    texts = job.output / "texts.jsonl"
    try:
        with open_job(drawing, choice, job.prompts, texts, options, console) as drawn:
            code = drawn.run()
            if code != INTERRUPTED:
                assert isinstance(drawn.decoder, EntryDecoder)
                records, method = read_texts(texts), drawn.decoder.method
                fitted = fit_and_save(method, records, plan, job.output, options, console, results)
                code = fitted or code
    finally:
        # A job that never began leaves nothing behind.
        if is_new and not any(job.output.iterdir()):
            job.output.rmdir()
    return code


def fit_and_save(
    method: OpenMethod,
    records: Sequence[RecordedTexts],
    plan: FitPlan,
    output: Path,
    options: JobOptions,
    console: Console,
    results: Console,
) -> int:
    """Fit a head to the texts of `records`, save it into `output`, and show what it knows.

    Returns:
        The exit code: 0, or 130 when it was interrupted.
    """
    texts = list(_logged_texts(method, records, options))
    num_texts = sum(len(entry.sequences) for entry in texts)
    say(console, f"fitting to {num_texts} texts of {len(texts)} prompts")

    def on_epoch(epoch: int, r2: float) -> None:
        total = plan.options.epochs
        say(console, f"epoch {epoch}/{total}: held-out R2 {r2:.3f}")

    try:
        head = fit_from_texts(
            method,
            texts,
            plan,
            on_epoch=on_epoch,
            batch_size=options.batch_size,
            memory_budget=options.memory_budget,
        )
    except KeyboardInterrupt:
        say(console, "stopped: the texts are kept; the same command fits to them again")
        return INTERRUPTED
    # A head that was there before goes only now that there is one to take its place.
    head.save(output)
    show_fit(head, num_texts * plan.rounds, results)
    say(console, f"the head is in {output}; decode with --method value_guided --value {output}")
    return 0


def show_fit(head: ValueHead, num_texts: int, console: Console) -> None:
    """Print what the head was fitted to, and what held-out prompts say of it."""
    fit = head.config.fit
    rows = {
        "texts": f"{num_texts:,}",
        "tokens": f"{fit['tokens']:,}",
        "prompts": f"{fit['prompts']:,}, of which {fit['held_out_prompts']:,} were held out",
        "held-out R2": f"{fit['r2']:.3f}",
    }
    for name, value in rows.items():
        say(console, f"{name:<12} {value}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("predicted", "observed", "tokens"):
        table.add_column(column, justify="right")
    for part in fit["calibration"]:
        table.add_row(f"{part['predicted']:.3f}", f"{part['observed']:.3f}", f"{part['tokens']:,}")
    say(console, "mean reward of held-out tokens, by what the head foretells:")
    console.print(table)


def _logged_texts(
    method: OpenMethod, records: Sequence[RecordedTexts], options: JobOptions
) -> Iterator[LoggedTexts]:
    reader = method.prompt_reader(options.template_options)
    for record in records:
        prompt, rewards = reader.read(record.index, record.prompt), record.rewards
        if rewards is None:
            # A job that sampled without a choice has scored nothing.
            reward, prompts = method.session.rewards["reward"], [prompt] * len(record.sequences)
            rewards = score_responses(reward, prompts, record.sequences)
        yield LoggedTexts(prompt, record.sequences, rewards)


def _check_output(output: Path) -> None:
    """Refuse a place where something else than a head is.

    Raises:
        InvalidArgument: a file is there, or the folder of another model.
    """
    if output.exists() and not output.is_dir():
        raise InvalidArgument(f"output {str(output)!r} must be a folder, it is a file")
    if (output / "config.json").exists():
        try:
            ValueHead.load(output)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"output {str(output)!r} holds another model than a value head; choose another "
                "folder"
            ) from error
