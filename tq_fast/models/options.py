"""Options for loading the models of a call, checked before any is loaded."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..config import Role, SpeedOptions, is_real
from ..errors import InvalidArgument
from ..rewards.options import RewardOptions
from .loading import TokenizerLike

ROLES: tuple[Role, ...] = ("baseline", "sft")
# Every role whose model can be named.
LOADED_ROLES = (*ROLES, "reward", "baseline_reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Options for loading the models that are given by name, and for reading rewards.

    The attributes are the keyword arguments of `TransferDecoder`, whose docstring explains them.

    Raises:
        InvalidArgument: a value is wrong; the message names the argument, its value and what was
            expected.
    """

    tokenizer: TokenizerLike | None = None
    reward_tokenizer: TokenizerLike | None = None
    baseline_reward_tokenizer: TokenizerLike | None = None
    reward_index: int | None = None
    reward_bounds: tuple[float, float] | None = None
    reward_options: RewardOptions | None = None
    device: torch.device | str | Mapping[str, torch.device | str] | None = None
    dtype: torch.dtype | str = "auto"
    speed: SpeedOptions | None = None
    model_kwargs: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward_bounds", _checked_bounds(self.reward_bounds))
        label = self.reward_index
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise InvalidArgument(f"reward_index must be an integer or None, got {label!r}")
        dtype = self.dtype
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        is_float = isinstance(named, torch.dtype) and named.is_floating_point
        if dtype != "auto" and not is_float:
            raise InvalidArgument(f"dtype must be 'auto' or a floating-point dtype, got {dtype!r}")
        if not isinstance(self.reward_options, (RewardOptions, type(None))):
            raise InvalidArgument(
                f"reward_options must be tq_fast.RewardOptions or None, got {self.reward_options!r}"
            )
        if not isinstance(self.speed, (SpeedOptions, type(None))):
            raise InvalidArgument(f"speed must be tq_fast.SpeedOptions or None, got {self.speed!r}")
        _check_model_kwargs(self.model_kwargs)
        check_device(self.device)


def _check_roles(name: str, by_role: Mapping[str, Any]) -> None:
    for role in by_role:
        if role not in LOADED_ROLES and not re.fullmatch(r"baseline_[1-9]\d*", str(role)):
            raise InvalidArgument(
                f"{name} must be by role ({', '.join(LOADED_ROLES)}), got {role!r}"
            )


def _check_model_kwargs(model_kwargs: Any) -> None:
    """Refuse what is not keyword arguments by role."""
    if model_kwargs is None:
        return
    if not isinstance(model_kwargs, Mapping):
        raise InvalidArgument(
            "model_kwargs must be a dict of keyword arguments by role or None, got "
            f"{type(model_kwargs).__name__}"
        )
    _check_roles("model_kwargs", model_kwargs)
    for role, options in model_kwargs.items():
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise InvalidArgument(
                f"model_kwargs of {role} must be a dict of keyword arguments of from_pretrained, "
                f"got {type(options).__name__}"
            )


def _checked_bounds(bounds: Any) -> tuple[float, float] | None:
    """Return `reward_bounds` as floats; refuse what is no finite interval."""
    if bounds is None:
        return None
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not is_pair or not all(is_real(end) for end in bounds):
        raise InvalidArgument(f"reward_bounds must be a pair (lo, hi) of numbers, got {bounds!r}")
    most = sys.float_info.max
    if not -most <= bounds[0] < bounds[1] <= most:
        raise InvalidArgument(f"reward_bounds must have lo < hi, both finite, got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def place_models(
    device: torch.device | str | Mapping[str, torch.device | str] | None, role: str = ""
) -> torch.device:
    """Return the device for models given by name: `device`, else a GPU if there is one.

    Args:
        device: one device, or a device by role.
        role: whose device; a role that `device` leaves out is placed as with None.

    Raises:
        InvalidArgument: there is no such device.
    """
    if isinstance(device, Mapping):
        device = device.get(role)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"device {device!r} cannot be used: {reason}") from error


def check_device(device: torch.device | str | Mapping[str, torch.device | str] | None) -> None:
    """Refuse a device, or one by role, that is not there.

    Raises:
        InvalidArgument: there is no such device or role.
    """
    if not isinstance(device, Mapping):
        place_models(device)
        return
    _check_roles("device", device)
    for role in device:
        place_models(device, role)
