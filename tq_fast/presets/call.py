"""One call of a preset: its options read and checked, and the two ways to carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import DecodeConfig, Role
from ..decoder import steer
from ..errors import InvalidArgument
from ..prompts import PromptLike
from ..results import DecodeResult
from ..session import ROLES, LoadingOptions, Session
from ..transfer.budget import check_sizes
from .plain import sample

_LOADING = tuple(field.name for field in dataclasses.fields(LoadingOptions))
_RUNNING = ("template_options", "batch_size", "memory_budget", "progress")
_MODELS = ("baseline", "reward", "sft", "baseline_reward")
_OTHERS = ("config", *_RUNNING, *_MODELS, *_LOADING)


class PresetCall:
    """The settings of one call of `method`.

    Args:
        method: the preset's name, for messages.
        fixed: config fields that the method fixes.
        models: models that the method uses where they are given, by argument name.
        options: the caller's other keyword arguments.

    Raises:
        InvalidArgument: an option is unknown or wrong, or differs from what the method fixes.
    """

    def __init__(
        self,
        method: str,
        fixed: Mapping[str, Any],
        models: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        options = dict(options)
        self.method = method
        self.running = {name: options.pop(name) for name in _RUNNING if name in options}
        # Wrong settings are refused before any model is loaded.
        check_sizes(self.running.get("batch_size", 1), self.running.get("memory_budget"))
        base = DecodeConfig.from_options(options.pop("config", None))
        baseline_reward = options.pop("baseline_reward", None)
        self.loading = LoadingOptions(
            **{name: options.pop(name) for name in _LOADING if name in options}
        )
        self.models = {name: model for name, model in models.items() if model is not None}
        default = DecodeConfig()
        for name, value in fixed.items():
            in_config = getattr(base, name)
            given = options.get(name, value if in_config == getattr(default, name) else in_config)
            if given != value:
                raise InvalidArgument(
                    f"{name} is {value!r} for the method {method!r}, got {given!r}"
                )
        merged = {**options, **fixed}
        if fixed.get("transfer") == "indirect" and merged.get("beta", base.beta) is None:
            raise InvalidArgument(f"beta is needed by the method {method!r}, got None")
        self.config = DecodeConfig.from_options(base, _OTHERS, **merged)
        if self.config.needs_baseline_reward and baseline_reward is not None:
            self.models["baseline_reward"] = baseline_reward

    def require(self, *names: str) -> None:
        """Refuse a call without the models `names`."""
        for name in names:
            if name not in self.models:
                raise InvalidArgument(f"{name} is needed by the method {self.method!r}, got None")

    def sample(
        self, prompts: PromptLike | Any, weights: Mapping[Role, float], *, num: int = 1
    ) -> DecodeResult:
        """Decode without values; arguments are those of `presets.plain.sample`."""
        session = self._open()
        return sample(session, prompts, weights, num=num, config=self.config, **self.running)

    def steer(self, prompts: PromptLike | Any) -> DecodeResult:
        """Decode by Transfer Q* with roll-outs of the baseline or, without one, the SFT model."""
        session = self._open()
        roller: Role = "baseline" if "baseline" in session.languages else "sft"
        return steer(session, prompts, self.config, roller=roller, **self.running)

    def _open(self) -> Session:
        languages = {role: self.models.get(role) for role in ROLES}
        rewards = {role: self.models.get(role) for role in ("reward", "baseline_reward")}
        return Session(languages, rewards, self.loading)
