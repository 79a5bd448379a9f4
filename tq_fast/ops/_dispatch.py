"""Which implementation of an op runs: cuda > triton > cpu > ref, the first that accepts.

An op file declares one `Op`, with one line for each backend beyond the reference:

    _OP = Op(
        "topk_logprobs",
        topk_logprobs_ref,
        Backend("triton", python_function("tq_fast.kernels.topk_logprobs", "topk_logprobs_triton")),
        Backend("cpu", native_function("topk_logprobs", topk_logprobs_native, _fake), refuse_cpu),
    )

Every implementation and every refusal takes exactly the arguments of the reference. A refusal
answers None (accepted) or a sentence. Nothing is imported or loaded before the first call.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch

from .. import _native, env
from ..errors import BackendRefused, InvalidArgument

BackendName = Literal["cuda", "triton", "cpu"]
Implementation = Callable[..., Any]
Refusal = Callable[..., str | None]

_BACKENDS_OF_DEVICE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_OPS: dict[str, Op] = {}


class _OnDevice(Protocol):
    """A tensor, or the arguments of an op in one tuple that knows where they are."""

    @property
    def device(self) -> torch.device: ...


def _accept(*args: Any, **kwargs: Any) -> str | None:
    return None


class Backend(NamedTuple):
    """One way to run an op besides its reference.

    Attributes:
        name: the word that `backend=` pins. Two entries may share it; they are tried in order.
        resolve: makes the implementation, once, at first use. Raises BackendRefused with a
            sentence when it is not there (not built, not importable).
        refuse: None when the implementation takes these inputs, else a sentence.
        serves: the inputs that it is for, in words, where it takes a special case of the op only;
            None for an implementation of the whole op.
    """

    name: BackendName
    resolve: Callable[[], Implementation]
    refuse: Refusal = _accept
    serves: str | None = None


def python_function(module: str, name: str) -> Callable[[], Implementation]:
    """A resolver of `name` in a module of this package; an import error is the refusal."""

    def resolve() -> Implementation:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise BackendRefused(f"{module} cannot be imported: {error}") from error

    return resolve


def native_function(
    name: str,
    adapter: Implementation | None,
    fake: Callable[..., Any],
    library: Literal["cpu", "cuda"] = "cpu",
) -> Callable[[], Implementation]:
    """A resolver of the C++ op `torch.ops.tq_fast.<name>`, once the library that has it is loaded.

    `adapter` takes the arguments of the reference and calls the op; it is None where the schema has
    the same arguments. `fake` takes the arguments of the schema and makes outputs without data, for
    torch.compile.
    """

    def resolve() -> Implementation:
        reason = _native.cpu_refusal() if library == "cpu" else _native.cuda_refusal()
        if reason is not None:
            raise BackendRefused(reason)
        if not hasattr(torch.ops.tq_fast, name):
            raise BackendRefused(f"the C++ {library} library has no op {name}: build it again")
        if name not in _has_fake:
            torch.library.register_fake(f"tq_fast::{name}")(_on_one_device(name, fake))
            _has_fake.add(name)
        return adapter or getattr(torch.ops.tq_fast, name).default

    return resolve


_has_fake: set[str] = set()


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make `fake` refuse tensors of several devices: one on "meta" would let it answer for all."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        devices = {str(value.device) for value in arguments if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            raise InvalidArgument(f"{name}: its tensors are on {' and '.join(sorted(devices))}")
        return fake(*arguments)

    return checked


class Op:
    """The backends of one op, and the choice among them.

    Calling it runs the op: `op(backend, first, *args, **kwargs)`. `first.device` decides which
    backends are asked; `first` is the op's first tensor, or all its arguments in one tuple that has
    a device. `backend` None means TQ_FAST_BACKEND.
    """

    __slots__ = ("_backends", "_plans", "_resolved", "name", "reference")

    def __init__(self, name: str, reference: Implementation, *backends: Backend) -> None:
        self.name = name
        self.reference = reference
        self._backends = backends
        self._resolved: dict[int, Implementation | str] = {}
        self._plans: dict[str, tuple[tuple[Refusal, Implementation], ...]] = {}
        _OPS[name] = self

    def __call__(self, backend: str | None, first: _OnDevice, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self._resolve_all()
        pinned = backend or env.backend()
        if pinned == "ref":
            return self.reference(first, *args, **kwargs)
        if pinned != "auto":
            return self._pinned(pinned, first, *args, **kwargs)
        device = first.device.type
        plan = self._plans.get(device)
        if plan is None:
            plan = self._plan(device)
        for refuse, implementation in plan:
            if refuse(first, *args, **kwargs) is None:
                return implementation(first, *args, **kwargs)
        if device == "cuda" and self._backends:
            self._warn_slow(first, *args, **kwargs)
        return self.reference(first, *args, **kwargs)

    def kernel(self, name: str) -> Implementation | None:
        """The first implementation called `name` that is usable on this machine, or None."""
        for idx in self._indices(name):
            implementation = self._resolve(idx)
            if not isinstance(implementation, str):
                return implementation
        return None

    def forget(self) -> None:
        """Resolve every backend again at the next call (after a build, and in tests)."""
        self._resolved.clear()
        self._plans.clear()

    def why_not(self, name: str) -> str | None:
        """None when backend `name` of this op is usable on this machine, else a sentence.

        A backend whose implementations all serve special cases is not usable for the op.
        """
        if name == "ref":
            return None
        if not self._indices(name):
            return f"{self.name} has no {name} kernel"
        special = [self._backends[idx].serves for idx in self._indices(name)]
        if None not in special:
            return f"the {name} kernels of {self.name} serve {special[0]} only"
        missing = _missing_device(name)
        if missing is not None:
            return missing
        reasons = [self._resolve(idx) for idx in self._indices(name)]
        if any(not isinstance(reason, str) for reason in reasons):
            return None
        return str(reasons[0])

    def _indices(self, name: str) -> list[int]:
        return [idx for idx, entry in enumerate(self._backends) if entry.name == name]

    @_native.constant_when_compiling
    def _resolve_all(self) -> bool:
        """Load everything now: torch.compile runs this instead of tracing into it."""
        for idx in range(len(self._backends)):
            self._resolve(idx)
        return True

    def _resolve(self, idx: int) -> Implementation | str:
        if idx not in self._resolved:
            try:
                self._resolved[idx] = self._backends[idx].resolve()
            except BackendRefused as refusal:
                self._resolved[idx] = str(refusal)
        return self._resolved[idx]

    def _plan(self, device: str) -> tuple[tuple[Refusal, Implementation], ...]:
        plan = []
        for name in _BACKENDS_OF_DEVICE.get(device, ()):
            for idx in self._indices(name):
                implementation = self._resolve(idx)
                if not isinstance(implementation, str):
                    plan.append((self._backends[idx].refuse, implementation))
        self._plans[device] = tuple(plan)
        return self._plans[device]

    def _pinned(self, name: str, first: _OnDevice, *args: Any, **kwargs: Any) -> Any:
        if name not in env.BACKEND_CHOICES:
            choices = ", ".join(env.BACKEND_CHOICES)
            raise InvalidArgument(f"{self.name}: backend={name!r} is not one of {choices}")
        reasons = []
        device = first.device.type
        if not _runs_on(name, device):
            reasons.append(f"the tensors are on {device}")
        else:
            for idx in self._indices(name):
                implementation = self._resolve(idx)
                if isinstance(implementation, str):
                    reasons.append(implementation)
                    continue
                reason = self._backends[idx].refuse(first, *args, **kwargs)
                if reason is None:
                    return implementation(first, *args, **kwargs)
                reasons.append(reason)
        sentence = "; ".join(reasons) or f"{self.name} has no {name} kernel"
        raise BackendRefused(f"{self.name}: backend {name!r} refused: {sentence}")

    def _warn_slow(self, first: _OnDevice, *args: Any, **kwargs: Any) -> None:
        """Warn, once for each op, that CUDA tensors go to its reference, and say why."""
        reasons = []
        for idx, entry in enumerate(self._backends):
            if entry.name in ("cuda", "triton"):
                implementation = self._resolve(idx)
                reason = (
                    implementation
                    if isinstance(implementation, str)
                    else entry.refuse(first, *args, **kwargs)
                )
                reasons.append(f"{entry.name}: {reason}")
        if self.name not in _warned:
            _warned.add(self.name)
            why = "; ".join(reasons) or "it has no GPU kernel"
            warnings.warn(
                f"{self.name} runs on the PyTorch reference for CUDA tensors ({why})", stacklevel=4
            )


_warned: set[str] = set()


def _runs_on(name: str, device: str) -> bool:
    if name in _BACKENDS_OF_DEVICE.get(device, ()):
        return True
    # Triton's own interpreter runs its kernels on CPU tensors.
    return name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _missing_device(name: str) -> str | None:
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def describe_backends() -> dict[str, dict[str, str | None]]:
    """For each op and backend: None when usable on this machine, else the reason why not."""
    names = ("cuda", "triton", "cpu", "ref")
    return {op.name: {name: op.why_not(name) for name in names} for op in _OPS.values()}


def unchecked_kernel(op: str, backend: str | None = None) -> Implementation | None:
    """The C++ kernel of `op` for CPU tensors, without the checks and the choice of a backend.

    For the inner loop of a model, whose thousands of calls a second all have the same shapes and
    dtypes: the caller guarantees what the op's public function would check. The kernel takes the
    arguments of the reference. None where it was not built, or where `backend` (None:
    TQ_FAST_BACKEND) asks for another.
    """
    if (backend or env.backend()) not in ("auto", "cpu"):
        return None
    return _OPS[op].kernel("cpu")
