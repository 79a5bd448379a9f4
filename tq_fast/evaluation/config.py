"""The configuration of an evaluation, as read from TOML by `config_file`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
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


# The name of the pool of SFT samples that a ceiling is computed from. No method can have it: the
# names of methods begin with a letter or a digit.
POOL = "_ceiling"
# The seed that the pool is drawn with: a number that nobody takes, so that no method's responses
# are among the texts that its ceiling comes from.
_POOL_SEED = 7_919_365_182_501
# What a pool takes over from the settings of its set-up: how long a response is, and what ends it.
# Its texts follow the plain law of the SFT model, which every divergence is measured against.
PLAIN_FIELDS = ("max_new_tokens", "stop", "eos_token_id", "skip_special_tokens", "backend")


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
        value: folder of the value head that it decodes with; None without one, and where the head
            of a table [values.NAME] has no folder yet. `own` has its name.
        keeps_texts: whether its records hold all texts that it chose among.
    """

    name: str
    label: str
    method: str
    own: Mapping[str, Any]
    decode: Mapping[str, Any]
    models: Models
    swept: tuple[str, float] | None
    group: str
    value: Path | None = None
    keeps_texts: bool = False

    @property
    def is_pool(self) -> bool:
        """Whether this draws the pool of a ceiling, and is no method that is evaluated."""
        return self.name == POOL

    @property
    def group_label(self) -> str:
        """The label without the value of a sweep."""
        return self.label if self.swept is None else self.label.rsplit(", ", 1)[0]

    @property
    def num_texts(self) -> int:
        """The texts that it draws for a prompt with one seed."""
        return int(self.decode.get("num_return_sequences", 1))

    def config(self, seed: int) -> DecodeConfig:
        """Return the settings of one run, without those that the preset fixes."""
        return DecodeConfig(**self.decode, seed=seed)

    def seeds(self, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return the seeds that it runs with where the evaluation has the seeds `given`."""
        return (_POOL_SEED,) if self.is_pool else given


def pool_of(num_texts: int, models: Models, decode: Mapping[str, Any]) -> MethodSpec:
    """Return what draws a pool of `num_texts` SFT samples a prompt."""
    kept = {name: decode[name] for name in PLAIN_FIELDS if name in decode}
    kept["num_return_sequences"] = num_texts
    return MethodSpec(POOL, "pool of the ceiling", "sft", {}, kept, models, None, POOL)


@dataclasses.dataclass(frozen=True)
class SetupSpec:
    """Methods under one target reward.

    Attributes:
        name: of its records.
        title: what the report calls it.
        compare_with: methods that win-tie rates are computed against.
        models: roles of every method, and of the scoring.
        methods: in the order of the tables.
        pool: draws the SFT samples that the ceiling is computed from; None: there is no ceiling.
    """

    name: str
    title: str
    compare_with: tuple[str, ...]
    models: Models
    methods: tuple[MethodSpec, ...]
    pool: MethodSpec | None = None

    @property
    def jobs(self) -> tuple[MethodSpec, ...]:
        """Everything that decodes: the methods, and the pool after them."""
        return self.methods if self.pool is None else (*self.methods, self.pool)


@dataclasses.dataclass(frozen=True)
class ValueSpec:
    """A value head that is fitted before the methods that decode with it run.

    Attributes:
        name: of its table.
        setup: name of the set-up whose methods use it.
        prompts: where the prompts of its texts come from.
        drawing: has one method, which draws the texts and lets its reward score them.
        seed: of the texts and the fit.
        fit: the settings of the fit: transfer, beta, rounds, alpha and epochs.
    """

    name: str
    setup: str
    prompts: PromptSource
    drawing: SetupSpec
    seed: int
    fit: Mapping[str, Any]

    @property
    def texts(self) -> MethodSpec:
        """What draws the texts."""
        return self.drawing.methods[0]


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
        values: value heads that methods of the set-ups decode with.
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
    values: tuple[ValueSpec, ...]
    text: str
