"""The methods of a set-up in a configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import presets
from ..config import DecodeConfig
from ..errors import InvalidArgument, nearest
from ..presets.call import FIXED_FIELDS
from .config import MODEL_ROLES, MethodSpec, Models, ModelSource
from .config_tables import (
    DECODE_FIELDS,
    as_table,
    check_keys,
    checked_name,
    decode_value,
    is_list_of,
    model_source,
    model_table,
)
from .methods import PRIORS, needed_roles, source_of

_METHOD = ("method", "name", "label", "models", "sweep")


def method_table(
    table: dict[str, Any], where: str, folder: Path, models: Models, decode: Mapping[str, Any]
) -> list[MethodSpec]:
    """Return one method, or one for each value of its sweep."""
    preset = table.get("method")
    if not isinstance(preset, str) or preset not in presets.METHODS:
        hint = nearest(str(preset), presets.METHODS)
        raise InvalidArgument(f"{where}: method is {preset!r}; {hint}")
    name = checked_name(table.get("name", preset), where)
    where = f"{where} ({name})"
    settings = (*presets.own_settings(preset), *DECODE_FIELDS)
    check_keys(table, (*_METHOD, *settings), where)
    models = {**models, **model_table(table.get("models", {}), f"{where}, models", folder)}
    given = {key: decode_value(key, value) for key, value in table.items() if key not in _METHOD}
    if preset == "collab":
        models |= _several_baselines(given.pop("baselines", None), where, folder)
    label, sweep = str(table.get("label", name)), table.get("sweep")
    base = MethodSpec(name, label, preset, {}, {}, models, None, name)
    if sweep is None:
        return [_with_settings(base, decode, given, where)]
    check_keys(as_table(sweep, f"{where}, sweep"), settings, f"{where}, sweep")
    if len(sweep) != 1 or not is_list_of(next(iter(sweep.values())), int, float):
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
    fixed, known = FIXED_FIELDS[spec.method], presets.own_settings(spec.method)
    own = {key: value for key, value in given.items() if key in known}
    decode = {key: value for key, value in given.items() if key not in own}
    for key in decode.keys() & fixed.keys():
        raise InvalidArgument(f"{where}: {spec.method} fixes {key} = {fixed[key]!r}")
    # Shared settings give way where the method fixes them or has its own setting of that name.
    kept = {key: value for key, value in shared.items() if key not in fixed and key not in known}
    try:
        config = DecodeConfig(**{**kept, **decode, **fixed})
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from error
    if (source_of(spec.method, own) == "value") != ("value" in own):
        needed = "names no value" if "value" not in own else "has a value that its source is not"
        raise InvalidArgument(f"{where}: {spec.method} {needed}")
    for role in needed_roles(spec.method, own, config):
        roles = PRIORS if role == "prior" else (role,)
        if role in (*MODEL_ROLES, "prior") and not set(roles) & set(spec.models):
            named = " or ".join(roles)
            raise InvalidArgument(f"{where}: {spec.method} needs a model as {named}; there is none")
    return dataclasses.replace(spec, own=own, decode={**kept, **decode})


def _several_baselines(value: Any, where: str, folder: Path) -> dict[str, ModelSource]:
    """Return the models of Collab by their roles: "baseline", "baseline_2" and so on."""
    if not isinstance(value, list) or not value:
        raise InvalidArgument(f"{where}: baselines must be a list of models, got {value!r}")
    found = {}
    for number, one in enumerate(value, start=1):
        role = "baseline" if number == 1 else f"baseline_{number}"
        found[role] = model_source(one, f"{where}, {role}", folder)
    return found
