"""Results as the values that JSON has, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from .traces import StageTrace, StepTrace

_FLOAT_FIELDS = ("rewards", "q", "q_stderr", "ess", "prior_logprobs", "final_logprobs")
_NOT_FINITE = ("nan", "inf", "-inf")


def as_json(value: Any, not_finite: Callable[[float], Any]) -> Any:
    """Return `value` as JSON has it.

    Args:
        value: a result, or a part of one.
        not_finite: makes what stands for a number that is NaN or infinite.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name != "tokenizer"]
        return {name: as_json(getattr(value, name), not_finite) for name in names}
    if isinstance(value, torch.Tensor):
        return as_json(value.tolist(), not_finite)
    if isinstance(value, dict):
        return {name: as_json(part, not_finite) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json(part, not_finite) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    return value


def read_step(saved: dict[str, Any]) -> StepTrace:
    """Return the step that `as_json(step, str)` described."""
    types = {"candidates": torch.int64} | dict.fromkeys(_FLOAT_FIELDS, torch.float32)
    fields: dict[str, Any] = {name: from_json(value) for name, value in saved.items()}
    if saved["agents"] is not None:
        types["agents"] = torch.int64
    for name, dtype in types.items():
        fields[name] = torch.tensor(fields[name], dtype=dtype)
    return StepTrace(**fields)


def read_stage(saved: dict[str, Any]) -> StageTrace:
    """Return the stage that `as_json(stage, str)` described."""
    rewards = torch.tensor(from_json(saved["rewards"]), dtype=torch.float32)
    return StageTrace(**{**saved, "rewards": rewards})


def from_json(value: Any) -> Any:
    """Return `value` with numbers where `as_json(value, str)` wrote "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {name: from_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [from_json(part) for part in value]
    return float(value) if value in _NOT_FINITE else value
