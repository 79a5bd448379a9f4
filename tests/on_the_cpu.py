"""The bodies of tests and benches that need a GPU, run on the CPU so that they cannot rot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tq_fast import ops


class OnTheCpu(TorchFunctionMode):
    """A mode that makes tensors on the CPU, and leaves them there, where "cuda" is asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def unpin_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Let every op run its reference, whatever backend is pinned; return the list of the calls.

    The list grows with each call, by the name of the op and the backend that was asked for.
    """
    calls: list[tuple[str, str | None]] = []

    def unpinned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            calls.append((name, backend))
            return function(*args, backend="ref", **kwargs)

        return run

    for name in ops.describe_backends():
        monkeypatch.setattr(ops, name, unpinned(name, getattr(ops, name)))
    return calls
