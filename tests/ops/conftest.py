"""Runs each test of an op once for each backend that this machine has.

A test module names its op, `OP = "topk_logprobs"`, and its tests take the fixture `op`. A backend
that is added to the package is picked up without a change here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tq_fast import ops
from tq_fast.errors import BackendRefused, InvalidArgument


class OpUnderTest:
    """A public op pinned to one backend; tensors go to the device of the backend and come back."""

    def __init__(self, name: str, backend: str) -> None:
        self.name = name
        self.backend = backend
        on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.reference = getattr(ops, f"{name.rstrip('_')}_ref")
        self._function = getattr(ops, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op on the pinned backend; a refusal fails the test."""
        return self._run(self.backend, args, kwargs)

    def or_auto(self, *args: Any, **kwargs: Any) -> Any:
        """The op on the pinned backend; where that refuses, as for a caller who pins nothing."""
        try:
            return self._run(self.backend, args, kwargs)
        except BackendRefused as refusal:
            assert str(refusal).startswith(f"{self.name}: backend {self.backend!r} refused: ")
            return self._run("auto", args, kwargs)

    def _run(self, backend: str, args: Any, kwargs: Any) -> Any:
        moved = self._move(args, self.device)
        parameters = {name: self._move(value, self.device) for name, value in kwargs.items()}
        result = self._function(*moved, **parameters, backend=backend)
        if self.name.endswith("_"):
            for given, written in zip(args, moved, strict=True):
                if isinstance(given, Tensor) and written is not given:
                    given.copy_(written)
        return self._move(result, torch.device("cpu"))

    def _move(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(device) if value.device.type != device.type else value
        if isinstance(value, tuple):
            moved = [self._move(item, device) for item in value]
            return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
        return value


def _backends(op: str) -> list[str]:
    reasons = ops.describe_backends()[op]
    found = [name for name, reason in reasons.items() if reason is None]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and "triton" not in found
    if interpreted and reasons["triton"] != f"{op} has no triton kernel":
        found.append("triton")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" in metafunc.fixturenames:
        name = metafunc.module.OP
        backends = _backends(name)
        metafunc.parametrize(
            "op", [OpUnderTest(name, backend) for backend in backends], ids=backends
        )


@pytest.fixture
def rejects() -> Callable[[str, Callable[[], Any]], None]:
    """Call it with words and a call: InvalidArgument with these words must come of it."""

    def check(words: str, call: Callable[[], Any]) -> None:
        with pytest.raises(InvalidArgument, match=words):
            call()

    return check
