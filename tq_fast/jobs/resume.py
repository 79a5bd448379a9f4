"""Settings that the records of a job were made with, and checks that a job may go on from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..config import DecodeConfig
from ..decoder import TransferDecoder
from ..errors import InvalidArgument
from ..models.fingerprint import fingerprint_model
from ..rewards.base import Reward
from ..rewards.options import RewardOptions
from ..session import check_device
from .prompt_file import PromptEntry, digest_prompts
from .record_file import Line, OutputRefused, RecordFile

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_OF_PROMPTS = ("number of prompts", "prompts")
_ROLES = ("baseline", "sft", "reward", "baseline_reward")


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """The models of a job as they were named, and how to load them.

    Fields are the arguments of `TransferDecoder`, whose docstring says what they mean.

    Raises:
        InvalidArgument: there is no such device or dtype.
    """

    baseline: str
    reward: str
    sft: str | None = None
    baseline_reward: str | None = None
    tokenizer: str | None = None
    reward_tokenizer: str | None = None
    baseline_reward_tokenizer: str | None = None
    reward_index: int | None = None
    reward_bounds: tuple[float, float] | None = None
    reward_options: RewardOptions | None = None
    device: str | Mapping[str, str] | None = None
    dtype: str = "auto"
    model_kwargs: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        read_dtype(self.dtype)
        check_device(self.device)

    def load(self) -> TransferDecoder:
        """Return the decoder over these models; errors are those of `TransferDecoder`."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TransferDecoder(**{**arguments, "dtype": read_dtype(self.dtype)})


def read_dtype(name: str) -> torch.dtype | str:
    """Return the dtype that `name` stands for; "auto", as the models were saved, stays a word.

    Raises:
        InvalidArgument: there is no such dtype.
    """
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return name if name == "auto" else getattr(torch, name)


def stated_settings(
    config: DecodeConfig,
    models: ModelChoice,
    *,
    traces: bool,
    entries: Sequence[PromptEntry],
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that a job's command line says about its records.

    Device and batch size are left out, because results depend on them by rounding alone.
    """
    options = models.reward_options
    stated = {
        **dataclasses.asdict(config),
        "dtype": models.dtype,
        "reward_index": models.reward_index,
        "reward_bounds": models.reward_bounds,
        "reward_options": None if options is None else dataclasses.asdict(options),
        "template_options": template_options,
        "traces": traces,
        "number of prompts": len(entries),
        "prompts": digest_prompts(entries),
    }
    # A job of an earlier version states none.
    if models.model_kwargs:
        stated["model_kwargs"] = models.model_kwargs
    # JSON makes lists of tuples: what is stated looks as it will when the file is read again.
    return json.loads(json.dumps(stated))


def model_settings(decoder: TransferDecoder, models: ModelChoice) -> dict[str, Any]:
    """Return name and fingerprint of each model that was loaded, by role."""
    loaded = {
        "baseline": decoder.baseline,
        "sft": decoder.sft,
        "reward": decoder.reward,
        "baseline_reward": decoder.baseline_reward,
    }
    present = {role: model for role, model in loaded.items() if model is not None}
    names = {role: getattr(models, role) for role in present}
    return fingerprint_models(present, names, decoder.tokenizer)


def fingerprint_models(
    models: Mapping[str, PreTrainedModel | Reward],
    names: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Return `{"name": ..., "fingerprint": ...}` of each model, by role.

    Args:
        models: language models and rewards; a reward without a model of transformers has its name
            for a fingerprint.
        names: what the models were called.
        tokenizer: of the language models.
    """
    settings = {}
    for role, model in models.items():
        if isinstance(model, PreTrainedModel):
            fingerprint = fingerprint_model(model, tokenizer)
        elif isinstance(model.model, PreTrainedModel):
            fingerprint = fingerprint_model(model.model, model.tokenizer)
        else:
            fingerprint = model.name
        settings[role] = {"name": names[role], "fingerprint": fingerprint}
    return settings


def make_settings(stated: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the settings file; its `fingerprint` goes into every record."""
    contents = {role: model["fingerprint"] for role, model in loaded.items()}
    # Prompts may be appended later, which leaves the records that are there as they are.
    lasting = {name: value for name, value in stated.items() if name not in _OF_PROMPTS}
    whole = json.dumps([lasting, contents], sort_keys=True)
    fingerprint = hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
    return {
        "fingerprint": fingerprint,
        "tq_fast": __version__,
        "settings": stated,
        "models": loaded,
    }


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The output of a job as it is when the job starts.

    Attributes:
        settings: what the records were made with; None where it is not known.
        kept: the lines that stay, by the index of their prompt.
        failed: indices of kept lines that are error records.
        bad: lines that are no record.
        fingerprints: settings that the records name.
        first_other: least index whose record has another prompt than the prompt file, or None.
    """

    settings: dict[str, Any] | None = None
    kept: dict[int, Line] = dataclasses.field(default_factory=dict)
    failed: set[int] = dataclasses.field(default_factory=set)
    bad: list[Line] = dataclasses.field(default_factory=list)
    fingerprints: set[str] = dataclasses.field(default_factory=set)
    first_other: int | None = None


def read_earlier(
    file: RecordFile, entries: Sequence[PromptEntry], *, retry_errors: bool
) -> Earlier:
    """Read the output; with `retry_errors`, prompts that failed count as not decoded."""
    earlier = Earlier(settings=file.read_settings())
    others: list[int] = []
    for line in file.lines():
        record = line.record
        if record is None:
            earlier.bad.append(line)
            continue
        earlier.fingerprints.add(str(record.get("settings")))
        index = record["index"]
        if not 0 <= index < len(entries) or record.get("prompt") != entries[index].prompt:
            others.append(index)
        elif "error" not in record:
            earlier.failed.discard(index)
            # The line alone is kept: the record may be large, and is not needed again.
            earlier.kept[index] = dataclasses.replace(line, record=None)
        elif not retry_errors and index not in earlier.kept:
            earlier.failed.add(index)
            earlier.kept[index] = dataclasses.replace(line, record=None)
    return dataclasses.replace(earlier, first_other=min(others, default=None))


def check_stated(
    file: RecordFile,
    earlier: Earlier,
    stated: dict[str, Any],
    entries: Sequence[PromptEntry] = (),
) -> None:
    """Refuse to go on with other settings than `stated`, before any model is loaded.

    Prompts may have been appended to `entries` since.

    Raises:
        OutputRefused: the settings differ (the message says in what), or the file holds
            something else than records.
    """
    if not earlier.fingerprints:
        if earlier.bad and earlier.settings is None:
            raise OutputRefused(
                f"output {str(file.path)!r} exists and holds no record of this command; choose "
                "another output, or --overwrite to lose what it holds"
            )
        return
    differences = []
    if earlier.settings is not None:
        then = dict(earlier.settings.get("settings", {}))
        count = then.get("number of prompts")
        if isinstance(count, int) and then.get("prompts") == digest_prompts(entries[:count]):
            then |= {name: stated[name] for name in _OF_PROMPTS}
        differences = stated_differences(then, stated)
    if earlier.first_other is not None:
        other = f"the prompt with index {earlier.first_other} is another"
        differences = [*(text for text in differences if text != "other prompts"), other]
    _refuse(file, differences)


def check_models(file: RecordFile, earlier: Earlier, settings: dict[str, Any]) -> None:
    """Refuse to go on with other models, or where records name other settings than these.

    Raises:
        OutputRefused: the message names what differs.
    """
    if not earlier.fingerprints:
        return
    if earlier.settings is not None:
        _refuse(file, model_differences(earlier.settings.get("models", {}), settings["models"]))
    others = earlier.fingerprints - {settings["fingerprint"]}
    if others:
        difference = f"records name settings {min(others)}, these are {settings['fingerprint']}"
        if earlier.settings is None:
            difference += f" ({file.settings_path.name}, which said more, is not there)"
        _refuse(file, [difference])


def describe_repairs(earlier: Earlier) -> list[str]:
    """Return a sentence for each line that is left out."""
    return [
        f"line {line.number} of the output "
        + ("is no record" if line.is_whole else "was cut off while it was written")
        + "; its prompt is decoded again"
        for line in earlier.bad
    ]


def _refuse(file: RecordFile, differences: Sequence[str]) -> None:
    if differences:
        raise OutputRefused(
            f"output {str(file.path)!r} was made with other settings: {'; '.join(differences)}. "
            "Resume with those it was made with, choose another output, or --overwrite to start "
            "again"
        )


def stated_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two `stated_settings`, a phrase for each difference."""
    differences = []
    for name in [*now, *(name for name in then if name not in now)]:
        before, after = then.get(name), now.get(name)
        if before != after and name == "prompts":
            if then.get("number of prompts", 0) <= now["number of prompts"]:
                differences.append("other prompts")
        elif before != after:
            differences.append(f"{name} was {_words(before)}, is {_words(after)}")
    return differences


def model_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two `model_settings`, a phrase for each difference.

    Two models with one fingerprint are the same model, wherever they lie.
    """
    differences = []
    for role in _ROLES:
        before, after = then.get(role), now.get(role)
        if before is None or after is None:
            if before != after:
                names = [_words(model and model["name"]) for model in (before, after)]
                differences.append(f"{role} was {names[0]}, is {names[1]}")
        elif before["fingerprint"] != after["fingerprint"]:
            if before["name"] == after["name"]:
                differences.append(f"{role} {after['name']!r} has changed since")
            else:
                differences.append(f"{role} was {before['name']!r}, is {after['name']!r}")
    return differences


def _words(value: Any) -> str:
    return "not given" if value is None else repr(value)
