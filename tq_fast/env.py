"""The two environment variables of the package.

    TQ_FAST_BUILD    auto | none | cpu | cuda                what an installation builds
    TQ_FAST_BACKEND  auto | cuda | triton | cpu | ref        which backend every op uses

Each is read at its first use, not at import, and remembered; `reload` forgets both.
"""

from __future__ import annotations

import os

from .errors import InvalidArgument

BUILD_CHOICES = ("auto", "none", "cpu", "cuda")
BACKEND_CHOICES = ("auto", "cuda", "triton", "cpu", "ref")

# This is a plain dict, because torch.compile reads a dict as a guarded constant.
_values: dict[str, str] = {}


def _read(variable: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "").strip().lower() or "auto"
    if value not in choices:
        raise InvalidArgument(f"{variable}={value!r} is not one of {', '.join(choices)}")
    _values[variable] = value
    return value


def backend() -> str:
    """Return TQ_FAST_BACKEND, "auto" when unset; raise InvalidArgument for another word."""
    return _values.get("TQ_FAST_BACKEND") or _read("TQ_FAST_BACKEND", BACKEND_CHOICES)


def build() -> str:
    """Return TQ_FAST_BUILD, "auto" when unset; raise InvalidArgument for another word."""
    return _values.get("TQ_FAST_BUILD") or _read("TQ_FAST_BUILD", BUILD_CHOICES)


def reload() -> None:
    """Forget both values, so that they are read again at their next use."""
    _values.clear()
