"""Arguments that say how models are loaded and rewards read, checked before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from .config import SpeedOptions, is_real
from .errors import InvalidArgument


def check_loading(given: Mapping[str, Any]) -> None:
    """Check `reward_bounds`, `reward_index`, `dtype` and `speed`, those of them that are given.

    Raises:
        InvalidArgument: the message names the argument, its value and what was expected.
    """
    check_bounds(given.get("reward_bounds"))
    label = given.get("reward_index")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise InvalidArgument(f"reward_index must be an integer or None, got {label!r}")
    dtype = given.get("dtype", "auto")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_float = isinstance(named, torch.dtype) and named.is_floating_point
    if dtype != "auto" and not is_float:
        raise InvalidArgument(f"dtype must be 'auto' or a floating-point dtype, got {dtype!r}")
    speed = given.get("speed")
    if not isinstance(speed, (SpeedOptions, type(None))):
        raise InvalidArgument(f"speed must be tq_fast.SpeedOptions or None, got {speed!r}")


def check_bounds(bounds: Any) -> tuple[float, float] | None:
    """Return `reward_bounds` as floats.

    Raises:
        InvalidArgument: they are no pair (lo, hi) of finite numbers, lo < hi.
    """
    if bounds is None:
        return None
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not is_pair or not all(is_real(end) for end in bounds):
        raise InvalidArgument(f"reward_bounds must be a pair (lo, hi) of numbers, got {bounds!r}")
    most = sys.float_info.max
    if not -most <= bounds[0] < bounds[1] <= most:
        raise InvalidArgument(f"reward_bounds must have lo < hi, both finite, got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def place_models(device: torch.device | str | None) -> torch.device:
    """Where models that are named are put: `device`, else a GPU if there is one.

    Raises:
        InvalidArgument: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"device {device!r} cannot be used: {reason}") from error
