"""What the records of a job were made with, and how two such settings differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..config import DecodeConfig
from ..decoder import TransferDecoder
from ..errors import InvalidArgument
from ..rewards.base import Reward
from ..rewards.options import RewardOptions
from ..session import place_models

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ROLES = ("baseline", "sft", "reward", "baseline_reward")
# Numbers of each weight that enter a model's fingerprint.
_NUM_SAMPLES = 64


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
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise InvalidArgument(f"dtype must be one of {known}, got {self.dtype!r}")
        if self.device is not None:
            place_models(self.device)

    def load(self) -> TransferDecoder:
        """Return the decoder over these models; errors are those of `TransferDecoder`."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.dtype != "auto":
            arguments["dtype"] = getattr(torch, self.dtype)
        return TransferDecoder(**arguments)


def stated_settings(
    config: DecodeConfig, models: ModelChoice, *, traces: bool, prompts_digest: str, count: int
) -> dict[str, Any]:
    """Everything that a job's command line says about its records.

    Device and batch size are left out: results do not depend on them but for rounding.
    """
    options = models.reward_options
    stated = {
        **dataclasses.asdict(config),
        "dtype": models.dtype,
        "reward_index": models.reward_index,
        "reward_bounds": models.reward_bounds,
        "reward_options": None if options is None else dataclasses.asdict(options),
        "traces": traces,
        "number of prompts": count,
        "prompts": prompts_digest,
    }
    # As they look when they are read back.
    return json.loads(json.dumps(stated))


def model_settings(decoder: TransferDecoder, models: ModelChoice) -> dict[str, Any]:
    """Name and fingerprint of each model that was loaded, by role."""
    settings: dict[str, Any] = {}
    for role in _ROLES:
        loaded = getattr(decoder, role)
        if loaded is not None:
            if isinstance(loaded, PreTrainedModel):
                fingerprint = fingerprint_model(loaded, decoder.tokenizer)
            else:
                fingerprint = fingerprint_reward(loaded)
            settings[role] = {"name": getattr(models, role), "fingerprint": fingerprint}
    return settings


def make_settings(stated: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """The content of the settings file; its `fingerprint` goes into every record."""
    contents = {role: model["fingerprint"] for role, model in loaded.items()}
    whole = json.dumps([stated, contents], sort_keys=True)
    fingerprint = hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
    return {
        "fingerprint": fingerprint,
        "tq_fast": __version__,
        "settings": stated,
        "models": loaded,
    }


def stated_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `stated_settings`, each as one phrase."""
    differences = []
    for name in [*now, *(name for name in then if name not in now)]:
        before, after = then.get(name), now.get(name)
        if before != after and name == "prompts":
            if then.get("number of prompts") == now["number of prompts"]:
                differences.append("other prompts")
        elif before != after:
            differences.append(f"{name} was {_words(before)}, is {_words(after)}")
    return differences


def model_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `model_settings`, each as one phrase.

    A model is the same wherever it lies, if its fingerprint is.
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


def fingerprint_reward(reward: Reward) -> str:
    """What tells a reward from another one: its model's fingerprint, or the function's name."""
    if isinstance(reward.model, PreTrainedModel):
        return fingerprint_model(reward.model, reward.tokenizer)
    return reward.name


def fingerprint_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A short hash of a model's configuration, of some numbers of every weight, and its tokenizer.

    Cheap for large models, and different after any training; where the model lies does not matter.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.blake2b(
        json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8
    )
    for name, weight in sorted(model.state_dict().items()):
        stride = max(1, weight.numel() // _NUM_SAMPLES)
        sample = weight.detach().reshape(-1)[::stride].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(sample.numpy().tobytes())
    if tokenizer is not None:
        words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
        digest.update(json.dumps(words).encode())
    return digest.hexdigest()


def _words(value: Any) -> str:
    return "not given" if value is None else repr(value)
