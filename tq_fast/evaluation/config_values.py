"""The tables [values.NAME] of a configuration file: value heads that are fitted for methods.

    prompts, source, num_texts, max_new_tokens, transfer, beta, rounds, alpha, reward_states,
    epochs, seed, models

A method names such a table by `value = "NAME"`. Its head is fitted once for each set-up that uses
it, by default to the set-up's own reward, from texts to prompts other than those evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, nearest
from ..presets.fitting import FitPlan
from ..values.fitting import FitOptions
from .config import PLAIN_FIELDS, MethodSpec, SetupSpec, ValueSpec
from .config_tables import as_table, check_keys, checked_name, model_table, prompt_source
from .prompts import PromptSource

_FIT = ("transfer", "beta", "rounds", "alpha", "reward_states")
_VALUE = ("prompts", "source", "num_texts", "max_new_tokens", *_FIT, "epochs", "seed", "models")


@dataclasses.dataclass(frozen=True)
class ValueTable:
    """One table, before it is known which set-ups use it."""

    prompts: PromptSource
    source: str
    num_texts: int
    max_new_tokens: int | None
    models: Mapping[str, Any]
    seed: int
    fit: Mapping[str, Any]


def value_tables(tables: Any, where: str, folder: Path) -> dict[str, ValueTable]:
    """Read all tables [values.NAME]; nothing is loaded."""
    found = {}
    for name, table in as_table(tables, where).items():
        here = f"{where}.{name}"
        checked_name(name, where)
        found[name] = _value_table(as_table(table, here), here, folder)
    return found


def _value_table(table: Mapping[str, Any], where: str, folder: Path) -> ValueTable:
    check_keys(table, _VALUE, where)
    if "prompts" not in table:
        raise InvalidArgument(f"{where}: prompts is missing: others than those that are evaluated")
    source, seed = table.get("source", "sft"), table.get("seed", 0)
    if source not in ("sft", "baseline"):
        raise InvalidArgument(f"{where}: source must be 'sft' or 'baseline', got {source!r}")
    length = table.get("max_new_tokens")
    if length is not None and (type(length) is not int or length < 1):
        raise InvalidArgument(
            f"{where}: max_new_tokens must be an integer of at least 1, got {length!r}"
        )
    if type(seed) is not int:
        raise InvalidArgument(f"{where}: seed must be an integer, got {seed!r}")
    given = {name: table[name] for name in (*_FIT, "num_texts") if name in table}
    try:
        # Wrong values are refused before anything is drawn.
        plan = FitPlan(**given, options=FitOptions(epochs=table.get("epochs", 6)))
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from error
    return ValueTable(
        prompts=prompt_source(table["prompts"], f"{where}, prompts", folder),
        source=source,
        num_texts=plan.num_texts,
        max_new_tokens=length,
        models=model_table(table.get("models", {}), f"{where}, models", folder),
        seed=seed,
        fit={**{name: getattr(plan, name) for name in _FIT}, "epochs": plan.options.epochs},
    )


def resolve_values(
    setup: SetupSpec,
    decode: Mapping[str, Any],
    tables: Mapping[str, ValueTable],
    where: str,
    folder: Path,
) -> tuple[SetupSpec, list[ValueSpec]]:
    """Return the set-up and the heads that it needs; methods that name a folder get it.

    Args:
        setup: as it was read.
        decode: its settings of decoding.
        tables: all tables [values.NAME].
        where: for messages.
        folder: of the configuration, from which a relative folder is taken.
    """
    methods: list[MethodSpec] = []
    used: dict[str, ValueSpec] = {}
    for method in setup.methods:
        name = method.own.get("value")
        if name is None or name in tables:
            methods.append(method)
            if name is not None and name not in used:
                used[name] = _spec(name, tables[name], setup, decode, where)
            continue
        if not isinstance(name, str) or "/" not in name:
            hint = nearest(str(name), tables)
            raise InvalidArgument(
                f"{where}, {method.name}: value must name a table [values.NAME] or a folder, got "
                f"{name!r}; {hint}"
            )
        path = folder / name if name.startswith(("./", "../")) else Path(name)
        methods.append(dataclasses.replace(method, value=path))
    return dataclasses.replace(setup, methods=tuple(methods)), list(used.values())


def _spec(
    name: str, table: ValueTable, setup: SetupSpec, decode: Mapping[str, Any], where: str
) -> ValueSpec:
    models = {**setup.models, **table.models}
    is_indirect = table.fit["transfer"] == "indirect"
    needed = ("sft", "baseline") if is_indirect else (table.source,)
    for role in needed:
        if role not in models:
            raise InvalidArgument(f"{where}: values.{name} needs a model as {role}; there is none")
    if is_indirect and table.source != "baseline":
        raise InvalidArgument(
            f"{where}: values.{name}: transfer = 'indirect' weighs texts of the baseline, got "
            f"source = {table.source!r}"
        )
    kept = {field: decode[field] for field in PLAIN_FIELDS if field in decode}
    if table.max_new_tokens is not None:
        kept["max_new_tokens"] = table.max_new_tokens
    # A model that draws no text would only be measured against.
    other = "sft" if table.source == "baseline" else "baseline"
    drawing_models = {role: source for role, source in models.items() if role != other}
    texts = MethodSpec(
        name="texts",
        label=f"texts of {name}",
        method="best_of_n",
        own={"n": table.num_texts, "source": table.source},
        decode=kept,
        models=drawing_models,
        swept=None,
        group="texts",
        keeps_texts=True,
    )
    drawing = SetupSpec(f"{setup.name}-{name}", f"texts of {name}", (), models, (texts,))
    return ValueSpec(name, setup.name, table.prompts, drawing, table.seed, table.fit)
