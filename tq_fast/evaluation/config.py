"""The configuration of an evaluation, as read from TOML by `config_file`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import DecodeConfig
from .prompts import PromptSource

MODEL_ROLES = ("baseline", "sft", "reward", "baseline_reward", "gold", "judge", "embedder")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model by its name, and what is done to it.

    Attributes:
        name: a hub id, a folder, or "tiny:..." for a part of the embedded world.
        keep: part of the weights of a reward's last layer that stays; the others become 0.
        sparsify_seed: of the draw of the weights that stay.
    """

    name: str
    keep: float = 1.0
    sparsify_seed: int = 0

    def __str__(self) -> str:
        return self.name if self.keep == 1.0 else f"{self.name} (keep {self.keep:g})"


# Sources of models by role (`MODEL_ROLES`), and settings of their loading (`config_file.LOADING`).
Models = Mapping[str, ModelSource | str | int]


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """One method of a set-up, ready to be called.

    Attributes:
        name: of its records; unique in the set-up.
        label: what tables and pictures call it.
        method: name of the preset.
        own: the preset's own settings (`n` of best_of_n, ...).
        decode: fields of `DecodeConfig` that were given; the seed comes with each run.
        models: roles and how to load them.
        swept: (setting, value) where it is one of a sweep, else None.
        group: name before the sweep was expanded.
    """

    name: str
    label: str
    method: str
    own: Mapping[str, Any]
    decode: Mapping[str, Any]
    models: Models
    swept: tuple[str, float] | None
    group: str

    def config(self, seed: int) -> DecodeConfig:
        """Return the settings of one run, without those that the preset fixes."""
        return DecodeConfig(**self.decode, seed=seed)


@dataclasses.dataclass(frozen=True)
class SetupSpec:
    """Methods under one target reward.

    Attributes:
        name: of its records.
        title: what the report calls it.
        compare_with: methods that win-tie rates are computed against.
        models: roles of every method, and of the scoring.
        methods: in the order of the tables.
    """

    name: str
    title: str
    compare_with: tuple[str, ...]
    models: Models
    methods: tuple[MethodSpec, ...]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The whole configuration of an evaluation.

    Attributes:
        title: of the report.
        description: a paragraph for the report.
        seeds: every method decodes every prompt with each of them.
        workers: processes of one thread each; 1 decodes in the calling process.
        batch_size: prompts decoded together. Results do not depend on it.
        traces: first prompts whose traces, of the first seed, are kept.
        resamples: of the bootstrap.
        prompts: where prompts come from.
        setups: in the order of the report.
        text: the file itself.
    """

    title: str
    description: str
    seeds: tuple[int, ...]
    workers: int
    batch_size: int
    traces: int
    resamples: int
    prompts: PromptSource
    setups: tuple[SetupSpec, ...]
    text: str
