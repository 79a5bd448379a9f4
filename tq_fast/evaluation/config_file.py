"""Configuration files of an evaluation: TOML, checked as a whole before any model is touched.

    title, description, seeds, workers, batch_size, traces, resamples, ceiling
    [prompts]  [models]  [decode]  [values.NAME]
    [[setup]]  name, title, compare_with, ceiling, [setup.models], [setup.decode]
    [[setup.method]]  method, name, label, models, sweep, and the method's own settings

The tables [models] and [decode] hold for every set-up, those of a set-up for each of its methods;
the innermost wins. `sweep = { alpha = [0.5, 1.0] }` stands for one method a value.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, nearest
from .config import EvalConfig, MethodSpec, Models, SetupSpec, ValueSpec, pool_of
from .config_methods import method_table
from .config_tables import (
    check_keys,
    check_unique,
    checked_name,
    decode_table,
    is_list_of,
    model_table,
    prompt_source,
    tables,
)
from .config_values import ValueTable, resolve_values, value_tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_COUNTS = {"workers": 1, "batch_size": 16, "traces": 4, "resamples": 2000}
_TOP = (
    *("title", "description", "seeds", *_COUNTS, "ceiling"),
    *("prompts", "models", "decode", "values", "setup"),
)
_SETUP = ("name", "title", "compare_with", "ceiling", "models", "decode", "method")


def find_config(name: str) -> Path:
    """Return the file `name`, or the shipped recipe of that name.

    Raises:
        InvalidArgument: there is neither; the message names the nearest recipe.
    """
    path = Path(name)
    known = {recipe.stem: recipe for recipe in recipe_files()}
    if not path.is_file() and name not in known:
        hint = nearest(name, known)
        raise InvalidArgument(f"config {name!r} is neither a file nor a shipped recipe; {hint}")
    return path if path.is_file() else known[name]


def recipe_files() -> list[Path]:
    """Return the recipes that come with the package."""
    return sorted(Path(str(resources.files(__package__) / "recipes")).glob("*.toml"))


def load_config(path: Path) -> EvalConfig:
    """Read and check a configuration; no model is loaded and no prompt read.

    Raises:
        InvalidArgument: the message names the table, the key and what was expected.
    """
    where = f"config {path.name!r}"
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise InvalidArgument(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"{where} is not TOML: {error}") from error
    check_keys(table, _TOP, where)
    for key in ("prompts", "setup"):
        if key not in table:
            raise InvalidArgument(f"{where}: {key} is missing")
    seeds = table.get("seeds", [0])
    if not is_list_of(seeds, int) or len(set(seeds)) != len(seeds):
        raise InvalidArgument(f"{where}: seeds must be different integers, got {seeds!r}")
    for key, default in _COUNTS.items():
        low = 0 if key == "traces" else 1
        if type(table.setdefault(key, default)) is not int or table[key] < low:
            raise InvalidArgument(
                f"{where}: {key} must be an integer of at least {low}, got {table[key]!r}"
            )
    models = model_table(table.get("models", {}), f"{where}, models", path.parent)
    decode = decode_table(table.get("decode", {}), f"{where}, decode")
    ceiling = _ceiling(table.get("ceiling", 0), where)
    values = value_tables(table.get("values", {}), f"{where}, values", path.parent)
    setups: list[SetupSpec] = []
    heads: list[ValueSpec] = []
    for i, part in enumerate(tables(table["setup"], f"{where}, setup")):
        here = f"{where}, set-up {i + 1}"
        setup, own = _setup(part, here, path.parent, models, decode, ceiling, values)
        setups.append(setup)
        heads += own
    check_unique([setup.name for setup in setups], f"{where}, setup")
    return EvalConfig(
        title=str(table.get("title", path.stem)),
        description=str(table.get("description", "")),
        seeds=tuple(seeds),
        **{key: table[key] for key in _COUNTS},
        prompts=prompt_source(table["prompts"], f"{where}, prompts", path.parent),
        setups=tuple(setups),
        values=tuple(heads),
        text=text,
    )


def _ceiling(value: Any, where: str) -> int:
    """Return the SFT samples a prompt that the ceiling is computed from; 0: there is none."""
    if type(value) is not int or value < 0 or value == 1:
        expected = "a number of SFT samples a prompt of at least 2, or 0 for no ceiling"
        raise InvalidArgument(f"{where}: ceiling must be {expected}, got {value!r}")
    return value


def _setup(
    table: dict[str, Any],
    where: str,
    folder: Path,
    models: Models,
    decode: Mapping[str, Any],
    ceiling: int,
    values: Mapping[str, ValueTable],
) -> tuple[SetupSpec, list[ValueSpec]]:
    """Return a set-up and the value heads that its methods decode with."""
    check_keys(table, _SETUP, where)
    name = checked_name(table.get("name"), where)
    where = f"{where} ({name})"
    models = {**models, **model_table(table.get("models", {}), f"{where}, models", folder)}
    decode = {**decode, **decode_table(table.get("decode", {}), f"{where}, decode")}
    if "reward" not in models:
        raise InvalidArgument(f"{where}: models must name a reward, the target")
    methods: list[MethodSpec] = []
    for i, part in enumerate(tables(table.get("method"), f"{where}, method")):
        methods += method_table(part, f"{where}, method {i + 1}", folder, models, decode)
    names = [method.name for method in methods]
    check_unique(names, f"{where}, method")
    compare_with = table.get("compare_with", [])
    for other in compare_with:
        if other not in names:
            hint = nearest(other, names)
            raise InvalidArgument(f"{where}: compare_with names no method: {other!r}; {hint}")
    ceiling = _ceiling(table.get("ceiling", ceiling), where)
    if ceiling and "sft" not in models:
        raise InvalidArgument(f"{where}: ceiling needs a model as sft; there is none")
    pool = pool_of(ceiling, models, decode) if ceiling else None
    title = str(table.get("title", name))
    setup = SetupSpec(name, title, tuple(compare_with), models, tuple(methods), pool)
    return resolve_values(setup, decode, values, where, folder)
