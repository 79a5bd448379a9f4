"""Value heads of an evaluation: texts of a job of their own, and a head fitted to them, once.

values/SETUP/NAME/records/SETUP-NAME/texts.jsonl     every text and its reward, a record a prompt
values/SETUP/NAME/head/                              the head
values/SETUP/NAME/fit.json                           what it was fitted with, and to
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument
from ..jobs.prompt_file import PromptEntry
from ..jobs.record_file import OutputRefused
from ..jobs.resume import stated_differences
from ..jobs.texts import RecordedTexts, read_texts
from ..models.fingerprint import fingerprint_file
from ..presets.call import OpenMethod
from ..presets.fitting import FitPlan, LoggedTexts, fit_from_texts, open_logging
from ..prompts import Prompt
from ..values.fitting import FitOptions
from .config import EvalConfig, ValueSpec
from .models import LoadedModels
from .results import records_path, write_text


def folder_of(output: Path, spec: ValueSpec) -> Path:
    """Return the folder of everything that belongs to a head."""
    return output / "values" / spec.setup / spec.name


def head_folder(output: Path, spec: ValueSpec) -> Path:
    """Return the folder of the head itself."""
    return folder_of(output, spec) / "head"


def place_values(config: EvalConfig, output: Path) -> EvalConfig:
    """Return `config` with the folders in which the methods find their heads."""
    folders = {(spec.setup, spec.name): head_folder(output, spec) for spec in config.values}
    setups = []
    for setup in config.setups:
        methods = []
        for method in setup.methods:
            placed = folders.get((setup.name, str(method.own.get("value"))))
            methods.append(dataclasses.replace(method, value=placed or method.value))
        setups.append(dataclasses.replace(setup, methods=tuple(methods)))
    return dataclasses.replace(config, setups=tuple(setups))


def drawing_config(config: EvalConfig, spec: ValueSpec) -> EvalConfig:
    """Return the evaluation that draws the texts of a head: one method, one seed."""
    return dataclasses.replace(
        config,
        title=f"texts of {spec.name}",
        seeds=(spec.seed,),
        traces=0,
        prompts=spec.prompts,
        setups=(spec.drawing,),
        values=(),
    )


class ValueFit:
    """The fit of one head.

    Args:
        spec: the head.
        output: of the evaluation.
    """

    def __init__(self, spec: ValueSpec, output: Path) -> None:
        self.spec = spec
        self.folder = folder_of(output, spec)
        self.head = head_folder(output, spec)
        self.texts = records_path(self.folder, spec.drawing, spec.texts)
        self._record = self.folder / "fit.json"

    @property
    def label(self) -> str:
        """The name of the head in messages."""
        return f"{self.spec.setup}/{self.spec.name}"

    def is_done(self) -> bool:
        """Return whether the head is there, fitted to the texts that are there.

        Raises:
            OutputRefused: it was fitted with other settings.
        """
        known = read_fit(self.folder)
        if known is None:
            return False
        differences = stated_differences(known["settings"], self._settings())
        if differences:
            raise OutputRefused(
                f"the value head {self.label} was fitted with other settings: "
                f"{'; '.join(differences)}. Choose another output, or --overwrite to start again"
            )
        return bool(self.texts.is_file() and known["texts"] == fingerprint_file(self.texts))

    def forget(self) -> None:
        """Remove the head; its texts stay."""
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.head, ignore_errors=True)

    def fit(
        self,
        models: LoadedModels,
        *,
        on_epoch: Callable[[int, float], None],
        batch_size: int,
        chat: bool,
    ) -> dict[str, Any]:
        """Fit a head to the texts, save it, and return what it says of itself.

        Args:
            models: those of the set-up and of the table.
            on_epoch: called after each epoch with its number and the held-out R2.
            batch_size: prompts that further rounds decode together.
            chat: whether a text is a user's message in the chat template.
        """
        records = read_texts(self.texts)
        plan = self._plan()
        opened = self._open(models)
        texts = list(_logged(opened, records, chat=chat))
        head = fit_from_texts(opened, texts, plan, on_epoch=on_epoch, batch_size=batch_size)
        self.forget()
        head.save(self.head)
        fitted = {
            "settings": self._settings(),
            "texts": fingerprint_file(self.texts),
            "num_texts": sum(len(entry.sequences) for entry in texts) * plan.rounds,
            "token_forwards": self._cost(),
            "fit": head.config.fit,
        }
        # The file is written last: a head without it counts as not fitted.
        write_text(self._record, json.dumps(fitted, indent=2) + "\n")
        return fitted

    def _plan(self) -> FitPlan:
        fit = dict(self.spec.fit)
        options = FitOptions(epochs=fit.pop("epochs"), seed=self.spec.seed)
        return FitPlan(**fit, num_texts=self.spec.texts.own["n"], options=options)

    def _open(self, models: LoadedModels) -> OpenMethod:
        source = self.spec.texts.own["source"]
        arguments = models.preset_arguments()
        given = {role: arguments.pop(role, None) for role in ("sft", "baseline", "reward")}
        arguments["config"] = self.spec.texts.config(self.spec.seed)
        num_texts = self.spec.texts.own["n"]
        return open_logging(
            f"values.{self.spec.name}", given, arguments, num_texts=num_texts, source=source
        )

    def _settings(self) -> dict[str, Any]:
        settings = {**self.spec.fit, "seed": self.spec.seed}
        return dict(json.loads(json.dumps(settings)))

    def _cost(self) -> float:
        """Return the token-forwards that drawing and scoring the texts took."""
        total = 0.0
        with self.texts.open(encoding="utf-8") as lines:
            for line in lines:
                counts = json.loads(line).get("measures", {}).get("token_forwards", {})
                total += sum(counts.values())
        return total


def _logged(
    opened: OpenMethod, records: Sequence[RecordedTexts], *, chat: bool
) -> Iterator[LoggedTexts]:
    reader = opened.prompt_reader()
    for record in records:
        given = record.prompt
        if chat and isinstance(given, str):
            given = [{"role": "user", "content": given}]
        prompt: Prompt = reader.read(record.index, given)
        assert record.rewards is not None, "best of n scores every text"
        yield LoggedTexts(prompt, record.sequences, record.rewards)


def read_fit(folder: Path) -> dict[str, Any] | None:
    """Return what the head in the folder `folder_of` was fitted with; None where there is none."""
    path = folder / "fit.json"
    if not path.is_file() or not (folder / "head" / "model.safetensors").is_file():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def check_others(spec: ValueSpec, fitted: Iterable[PromptEntry], asked: Iterable[Any]) -> None:
    """Refuse a head that would be fitted on what it is evaluated on.

    Args:
        spec: the head.
        fitted: prompts of its texts.
        asked: prompts that are evaluated, as they were given.

    Raises:
        InvalidArgument: the message names the prompt.
    """
    known = {json.dumps(prompt) for prompt in asked}
    for entry in fitted:
        if json.dumps(entry.prompt) in known:
            raise InvalidArgument(
                f"values.{spec.name}: prompt {entry.index} is one of those that are evaluated: "
                f"{entry.prompt!r:.80}"
            )


def describe_heads(config: EvalConfig, output: Path) -> list[dict[str, Any]]:
    """Return what a summary says of every head that is fitted."""
    described = []
    for spec in config.values:
        known = read_fit(folder_of(output, spec))
        if known is not None:
            described.append(
                {
                    "name": spec.name,
                    "setup": spec.setup,
                    "source": spec.texts.own["source"],
                    "prompts": known["fit"]["prompts"],
                    "num_texts": known["num_texts"],
                    "token_forwards": known["token_forwards"],
                    "r2": known["fit"]["r2"],
                }
            )
    return described
