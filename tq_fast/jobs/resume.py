"""Settings that the records of a job were made with, and checks that a job may go on from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import presets
from .._version import read_version
from ..config import DecodeConfig
from ..errors import InvalidArgument, nearest
from ..models.fingerprint import fingerprint_file, fingerprint_model
from ..models.options import LOADED_ROLES, check_device
from ..models.served import LanguageModel, ServedModel
from ..presets.call import OpenMethod, PresetCall
from ..rewards.base import Reward
from ..rewards.options import RewardOptions
from ..servers import Server
from .prompt_file import PromptEntry, digest_prompts
from .record_file import Line, OutputRefused, RecordFile

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_OF_PROMPTS = ("number of prompts", "prompts")
# Settings of a method's own that name models: they are stated by the contents of these.
_OWN_MODELS = ("value", "baselines")


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """The method of a job, its models as they were named, and how to load them.

    Fields are the arguments of the presets, and those of `TransferDecoder`, whose docstring says
    what they mean.

    Attributes:
        method: the preset's name; None: direct or indirect Transfer Q*, as the config's transfer
            says.
        own: settings of the method's own, by argument name; those left out have their defaults.

    Raises:
        InvalidArgument: there is no such method, device or dtype.
    """

    baseline: str | None = None
    reward: str | None = None
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
    method: str | None = None
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        read_dtype(self.dtype)
        check_device(self.device)
        if self.method is not None and self.method not in presets.METHODS:
            hint = nearest(self.method, presets.METHODS)
            raise InvalidArgument(f"method {self.method!r} is unknown; {hint}")

    def method_name(self, config: DecodeConfig) -> str:
        """Return the name of the preset that decodes."""
        return self.method or _default_method(config.transfer)

    def own_settings(self, config: DecodeConfig) -> dict[str, Any]:
        """Return every setting of the method's own.

        One that is a field of the config too counts as given where the config says so.

        Raises:
            InvalidArgument: a setting is not one of the method's.
        """
        method = self.method_name(config)
        known = presets.own_settings(method)
        for name in self.own:
            if name not in known:
                has = f"its own are {', '.join(known)}" if known else "it has none of its own"
                raise InvalidArgument(f"{name} is no setting of the method {method!r}; {has}")
        default = DecodeConfig()
        in_config = {
            name: getattr(config, name)
            for name in known
            if hasattr(default, name) and getattr(config, name) != getattr(default, name)
        }
        return {**known, **in_config, **self.own}

    def load(self, config: DecodeConfig) -> OpenMethod:
        """Return the method over these models; errors are those of the preset."""
        own = self.own_settings(config)
        return presets.open_method(self.method_name(config), **self._arguments(config), **own)

    def check(self, config: DecodeConfig) -> None:
        """Refuse what can be known to be wrong before any model is loaded.

        Raises:
            InvalidArgument: as the preset raises it.
        """
        arguments = self._arguments(config)
        options = {name: arguments[name] for name in arguments if name not in LOADED_ROLES}
        self.own_settings(config)
        PresetCall(self.method_name(config), options, {})

    def _arguments(self, config: DecodeConfig) -> dict[str, Any]:
        """Return the arguments of the preset but for those of its own."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del arguments["method"], arguments["own"]
        return {**arguments, "dtype": read_dtype(self.dtype), "config": config}

    def names(self) -> dict[str, str]:
        """Return what each model that was named is called, by role."""
        named = {role: getattr(self, role) for role in LOADED_ROLES}
        several = self.own.get("baselines") or ()
        # Several baselines are counted from the second one on.
        named |= {
            f"baseline_{idx}" if idx > 1 else "baseline": name
            for idx, name in enumerate(several, start=1)
        }
        return {role: name for role, name in named.items() if name is not None}


def _default_method(transfer: str | None) -> str:
    return "transfer_q_indirect" if transfer == "indirect" else "transfer_q"


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
    method, own = models.method_name(config), models.own_settings(config)
    default = DecodeConfig()
    # What the method fixes is stated in the place of a default, which counts as not given.
    fixed = {
        name: value
        for name, value in presets.FIXED_FIELDS[method].items()
        if getattr(config, name) == getattr(default, name)
    }
    stated = {
        **dataclasses.asdict(config),
        **fixed,
        **{name: value for name, value in own.items() if name not in _OWN_MODELS},
        "dtype": models.dtype,
        "reward_index": models.reward_index,
        "reward_bounds": models.reward_bounds,
        "reward_options": None if options is None else dataclasses.asdict(options),
        "template_options": template_options,
        "traces": traces,
        "number of prompts": len(entries),
        "prompts": digest_prompts(entries),
    }
    # A job of an earlier version states neither of these.
    if model_kwargs := _stated_model_kwargs(models):
        stated["model_kwargs"] = model_kwargs
    if method != _default_method(stated["transfer"]):
        stated["method"] = method
    # JSON makes lists of tuples: what is stated looks as it will when the file is read again.
    return json.loads(json.dumps(stated))


def _stated_model_kwargs(models: ModelChoice) -> dict[str, dict[str, Any]]:
    """Return `model_kwargs` without the fields of servers.

    How patient a client is changes no record, the model's name at its server is stated with the
    models, and a key that was given for the name of its variable must not get into a file.
    """
    named = models.names()
    return {
        role: options
        for role, options in (models.model_kwargs or {}).items()
        if Server.named(named.get(role)) is None
    }


def model_settings(method: OpenMethod, models: ModelChoice) -> dict[str, Any]:
    """Return name and fingerprint of each model that was loaded, by role."""
    session = method.session
    present: dict[str, LanguageModel | Reward] = dict(session.rewards)
    present |= {str(role): model for role, model in session.languages.items()}
    given = models.names()
    names = {role: given.get(role, role) for role in present}
    settings = fingerprint_models(present, names, session.tokenizer)
    value = models.own.get("value")
    if value is not None:
        contents = fingerprint_file(Path(value) / "model.safetensors")
        settings["value"] = {"name": str(value), "fingerprint": contents}
    return settings


def fingerprint_models(
    models: Mapping[str, LanguageModel | Reward],
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
        elif isinstance(model, ServedModel):
            # A server that comes back may have another address.
            fingerprint = f"served as {model.name}"
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
        "tq_fast": read_version(),
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
        versions: of tq_fast that made the records which stay; "unknown" where nothing says so.
        first_other: least index whose record has another prompt than the prompt file, or None.
    """

    settings: dict[str, Any] | None = None
    kept: dict[int, Line] = dataclasses.field(default_factory=dict)
    failed: set[int] = dataclasses.field(default_factory=set)
    bad: list[Line] = dataclasses.field(default_factory=list)
    fingerprints: set[str] = dataclasses.field(default_factory=set)
    versions: set[str] = dataclasses.field(default_factory=set)
    first_other: int | None = None


def read_earlier(
    file: RecordFile, entries: Sequence[PromptEntry], *, retry_errors: bool
) -> Earlier:
    """Read the output; with `retry_errors`, prompts that failed count as not decoded."""
    earlier = Earlier(settings=file.read_settings())
    others: list[int] = []
    versions: dict[int, str] = {}
    # Records did not always name the version, but the settings beside them did.
    unnamed = (earlier.settings or {}).get("tq_fast", "unknown")
    for line in file.lines():
        record = line.record
        if record is None:
            earlier.bad.append(line)
            continue
        earlier.fingerprints.add(str(record.get("settings")))
        index = record["index"]
        versions[index] = str(record.get("tq_fast", unnamed))
        if not 0 <= index < len(entries) or record.get("prompt") != entries[index].prompt:
            others.append(index)
        elif "error" not in record:
            earlier.failed.discard(index)
            # The line alone is kept: the record may be large, and is not needed again.
            earlier.kept[index] = dataclasses.replace(line, record=None)
        elif not retry_errors and index not in earlier.kept:
            earlier.failed.add(index)
            earlier.kept[index] = dataclasses.replace(line, record=None)
    return dataclasses.replace(
        earlier,
        versions={versions[index] for index in earlier.kept},
        first_other=min(others, default=None),
    )


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
        differences = stated_differences(_with_method(then), _with_method(stated))
    if earlier.first_other is not None:
        other = f"the prompt with index {earlier.first_other} is another"
        differences = [*(text for text in differences if text != "other prompts"), other]
    _refuse(file, differences)


def _with_method(stated: dict[str, Any]) -> dict[str, Any]:
    """Name the method that a job without one has, for messages."""
    return {"method": _default_method(stated.get("transfer")), **stated}


def check_version(
    path: Path, earlier: Collection[Earlier], *, is_done: bool, mix_versions: bool
) -> None:
    """Refuse to add records to those of another version of the package, unless the caller asks.

    Args:
        path: the output, for the message.
        earlier: what each of its files holds.
        is_done: whether no record will be added, and nothing is refused.
        mix_versions: go on whatever made the records.

    Raises:
        OutputRefused: the message names both versions, and the ways on.
    """
    others = {version for file in earlier for version in file.versions} - {read_version()}
    if others and not is_done and not mix_versions:
        raise OutputRefused(
            f"output {str(path)!r} was made by tq-fast {', '.join(sorted(others))}, this is "
            f"{read_version()}, and two versions may decode differently. --mix-versions goes on, "
            "and new records name the version that made them; or go on with the earlier version, "
            "choose another output, or --overwrite to start again"
        )


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
    for role in [*LOADED_ROLES, *sorted({*then, *now} - set(LOADED_ROLES))]:
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
