"""Configuration files of an evaluation: TOML, checked as a whole before any model is touched.

    title, description, seeds, workers, batch_size, traces, resamples, ceiling
    [prompts]  [models]  [decode]
    [[setup]]  name, title, compare_with, ceiling, [setup.models], [setup.decode]
    [[setup.method]]  method, name, label, models, sweep, and the method's own settings

The tables [models] and [decode] hold for every set-up, those of a set-up for each of its methods;
the innermost wins. `sweep = { alpha = [0.5, 1.0] }` stands for one method a value.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .. import presets
from ..config import DecodeConfig
from ..errors import InvalidArgument, nearest
from ..presets.call import FIXED_FIELDS
from .config import MODEL_ROLES, EvalConfig, MethodSpec, Models, ModelSource, SetupSpec, pool_of
from .prompts import PromptKind, PromptSource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOADING = (
    *("tokenizer", "reward_tokenizer", "baseline_reward_tokenizer", "reward_index"),
    *("device", "dtype"),
)
_COUNTS = {"workers": 1, "batch_size": 16, "traces": 4, "resamples": 2000}
_TOP = (
    *("title", "description", "seeds", *_COUNTS, "ceiling"),
    *("prompts", "models", "decode", "setup"),
)
_SETUP = ("name", "title", "compare_with", "ceiling", "models", "decode", "method")
_METHOD = ("method", "name", "label", "models", "sweep")
_PROMPT_KINDS: tuple[PromptKind, ...] = ("tiny", "file", "dataset")
_PROMPTS = (*_PROMPT_KINDS, "limit", "chat", "split", "subset", "column", "remove")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")
# Arguments that every preset has; the others are its own settings.
_COMMON = ("prompts", "baseline", "reward", "sft", "options")
# A run has its own seed, and one response to each prompt.
_FIXED = ("seed", "num_return_sequences")
_DECODE = tuple(f.name for f in dataclasses.fields(DecodeConfig) if f.name not in _FIXED)
# Models that a preset cannot do without; `_with_settings` adds those that its settings ask for.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "sft": ("sft",),
    "baseline": ("baseline",),
    "dera": ("sft", "baseline"),
    "best_of_n": ("reward",),
    "args": ("reward",),
    "controlled_decoding": ("sft", "reward"),
    "transfer_q": ("baseline", "reward"),
    "direct_on_target": ("baseline", "reward"),
    "transfer_q_indirect": ("baseline", "reward"),
}


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
    if not _is_list_of(seeds, int) or len(set(seeds)) != len(seeds):
        raise InvalidArgument(f"{where}: seeds must be different integers, got {seeds!r}")
    for key, default in _COUNTS.items():
        low = 0 if key == "traces" else 1
        if type(table.setdefault(key, default)) is not int or table[key] < low:
            raise InvalidArgument(
                f"{where}: {key} must be an integer of at least {low}, got {table[key]!r}"
            )
    models = _models(table.get("models", {}), f"{where}, models", path.parent)
    decode = _decode(table.get("decode", {}), f"{where}, decode")
    ceiling = _ceiling(table.get("ceiling", 0), where)
    setups = [
        _setup(part, f"{where}, set-up {i + 1}", path.parent, models, decode, ceiling)
        for i, part in enumerate(_tables(table["setup"], f"{where}, setup"))
    ]
    _check_unique([setup.name for setup in setups], f"{where}, setup")
    return EvalConfig(
        title=str(table.get("title", path.stem)),
        description=str(table.get("description", "")),
        seeds=tuple(seeds),
        **{key: table[key] for key in _COUNTS},
        prompts=_prompt_source(table["prompts"], f"{where}, prompts", path.parent),
        setups=tuple(setups),
        text=text,
    )


def _prompt_source(table: Any, where: str, folder: Path) -> PromptSource:
    """Check the table `[prompts]`; no prompt is read."""
    check_keys(_as_table(table, where), _PROMPTS, where)
    kinds = [kind for kind in _PROMPT_KINDS if kind in table]
    if len(kinds) != 1:
        found = ", ".join(map(repr, kinds)) or "none of them"
        raise InvalidArgument(f"{where} must have one of {', '.join(_PROMPT_KINDS)}, got {found}")
    kind = kinds[0]
    limit = table.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InvalidArgument(f"{where}: limit must be an integer of at least 1, got {limit!r}")
    if kind == "tiny" and table["tiny"] is not True:
        raise InvalidArgument(f"{where}: tiny must be true, got {table['tiny']!r}")
    if kind != "tiny" and not isinstance(table[kind], str):
        raise InvalidArgument(f"{where}: {kind} must be text, got {table[kind]!r}")
    for key in ("split", "subset", "column"):
        if key in table and (kind != "dataset" or not isinstance(table[key], str)):
            raise InvalidArgument(f"{where}: {key} must be text, beside dataset")
    remove = table.get("remove", [])
    is_texts = isinstance(remove, list) and all(isinstance(part, str) for part in remove)
    if not is_texts or (remove and kind != "dataset"):
        raise InvalidArgument(f"{where}: remove must be a list of texts, beside dataset")
    if type(table.get("chat", False)) is not bool:
        raise InvalidArgument(f"{where}: chat must be true or false, got {table['chat']!r}")
    name = "held-out prompts" if kind == "tiny" else table[kind]
    options = {key: table[key] for key in _PROMPTS if key in table and key not in _PROMPT_KINDS}
    options["remove"] = tuple(remove)
    return PromptSource(kind, str(folder / name) if kind == "file" else name, **options)


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
) -> SetupSpec:
    check_keys(table, _SETUP, where)
    name = _checked_name(table.get("name"), where)
    where = f"{where} ({name})"
    models = {**models, **_models(table.get("models", {}), f"{where}, models", folder)}
    decode = {**decode, **_decode(table.get("decode", {}), f"{where}, decode")}
    if "reward" not in models:
        raise InvalidArgument(f"{where}: models must name a reward, the target")
    methods: list[MethodSpec] = []
    for i, part in enumerate(_tables(table.get("method"), f"{where}, method")):
        methods += _methods(part, f"{where}, method {i + 1}", folder, models, decode)
    names = [method.name for method in methods]
    _check_unique(names, f"{where}, method")
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
    return SetupSpec(name, title, tuple(compare_with), models, tuple(methods), pool)


def _methods(
    table: dict[str, Any], where: str, folder: Path, models: Models, decode: Mapping[str, Any]
) -> list[MethodSpec]:
    """Return one method, or one for each value of its sweep."""
    preset = table.get("method")
    if not isinstance(preset, str) or preset not in presets.METHODS:
        hint = nearest(str(preset), presets.METHODS)
        raise InvalidArgument(f"{where}: method is {preset!r}; {hint}")
    name = _checked_name(table.get("name", preset), where)
    where = f"{where} ({name})"
    settings = (*own_settings(preset), *_DECODE)
    check_keys(table, (*_METHOD, *settings), where)
    models = {**models, **_models(table.get("models", {}), f"{where}, models", folder)}
    given = {key: _value(key, value) for key, value in table.items() if key not in _METHOD}
    label, sweep = str(table.get("label", name)), table.get("sweep")
    base = MethodSpec(name, label, preset, {}, {}, models, None, name)
    if sweep is None:
        return [_with_settings(base, decode, given, where)]
    check_keys(_as_table(sweep, f"{where}, sweep"), settings, f"{where}, sweep")
    if len(sweep) != 1 or not _is_list_of(next(iter(sweep.values())), int, float):
        raise InvalidArgument(f"{where}: sweep must be one setting and its numbers, got {sweep!r}")
    (key, values), *_ = sweep.items()
    swept = []
    for value in values:
        one = dataclasses.replace(
            base,
            name=f"{name}-{key}={value:g}",
            label=f"{label}, {key} = {value:g}",
            swept=(key, float(value)),
        )
        swept.append(_with_settings(one, decode, {**given, key: value}, where))
    return swept


def _with_settings(
    spec: MethodSpec, shared: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> MethodSpec:
    """Tell the preset's own settings from those of decoding; check both, and the models."""
    fixed = FIXED_FIELDS[spec.method]
    own = {key: value for key, value in given.items() if key in own_settings(spec.method)}
    decode = {key: value for key, value in given.items() if key not in own}
    for key in decode.keys() & fixed.keys():
        raise InvalidArgument(f"{where}: {spec.method} fixes {key} = {fixed[key]!r}")
    # Shared settings give way where the method fixes them or has its own setting of that name.
    kept = {key: value for key, value in shared.items() if key not in fixed and key not in own}
    try:
        config = DecodeConfig(**{**kept, **decode, **fixed})
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from error
    needed = list(_NEEDS[spec.method])
    if spec.method == "best_of_n":
        needed.append(own.get("source", "baseline"))
    elif spec.method == "args":
        needed.append(own.get("prior", "sft"))
    elif spec.method == "transfer_q_indirect":
        needed.append("sft" if config.needs_log_ratio else "baseline_reward")
    for role in needed:
        if role in MODEL_ROLES and role not in spec.models:
            raise InvalidArgument(f"{where}: {spec.method} needs a model as {role}; there is none")
    return dataclasses.replace(spec, own=own, decode={**kept, **decode})


def own_settings(preset: str) -> tuple[str, ...]:
    """Return the settings that a preset has beside the fields of `DecodeConfig`."""
    parameters = inspect.signature(presets.METHODS[preset]).parameters
    return tuple(name for name in parameters if name not in _COMMON)


def _models(table: Any, where: str, folder: Path) -> dict[str, ModelSource | str | int]:
    check_keys(_as_table(table, where), (*MODEL_ROLES, *LOADING), where)
    read: dict[str, ModelSource | str | int] = {}
    for key, value in table.items():
        read[key] = value if key in LOADING else _source(value, f"{where}, {key}", folder)
    return read


def _source(value: Any, where: str, folder: Path) -> ModelSource:
    table = {"name": value} if isinstance(value, str) else _as_table(value, where)
    check_keys(table, ("name", "keep", "sparsify_seed"), where)
    name: Any = table.get("name")
    keep: Any = table.get("keep", 1.0)
    seed: Any = table.get("sparsify_seed", 0)
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"{where}: name must be a hub id or a folder, got {name!r}")
    if type(keep) not in (int, float) or not 0.0 < keep <= 1.0:
        raise InvalidArgument(f"{where}: keep must be in (0, 1], got {keep!r}")
    if type(seed) is not int:
        raise InvalidArgument(f"{where}: sparsify_seed must be an integer, got {seed!r}")
    # A relative folder is taken from where the configuration lies.
    name = str(folder / name) if name.startswith("./") or name.startswith("../") else name
    return ModelSource(name, float(keep), seed)


def _decode(table: Any, where: str) -> dict[str, Any]:
    check_keys(_as_table(table, where), _DECODE, where)
    return {key: _value(key, value) for key, value in table.items()}


def _value(key: str, value: Any) -> Any:
    # TOML has no null, so that a word stands for a horizon of None.
    return None if key == "horizon" and value == "none" else value


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        InvalidArgument: the message names the key, and the nearest known one.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise InvalidArgument(f"{where}: unknown key {key!r}; {nearest(key, known)}")


def _as_table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where} must be a table, got {value!r}")
    return value


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not _is_list_of(value, dict):
        raise InvalidArgument(f"{where} must be a list of at least one table, got {value!r}")
    return value


def _is_list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) in kinds for item in value)


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        expected = "letters, digits and _ . = + -, and begin with a letter or digit"
        raise InvalidArgument(f"{where}: name must consist of {expected}, got {name!r}")
    return name


def _check_unique(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"{where}: the name {name!r} stands there twice")
