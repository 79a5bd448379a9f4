"""A second device for machines that have none: tensors that live on the CPU and say "meta".

Operations between such tensors and those of the CPU are refused, as a GPU refuses them; only copies
pass from one to the other. A whole decode therefore shows whether every tensor is where it belongs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tq_fast
from tq_fast import ops

DEVICE = torch.device("meta")
_FROM_DATA = (torch.tensor, torch.as_tensor)
_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
# The host reads their results, or has to know a size that depends on the numbers.
_WAITED_FOR = (
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
)
_HERE = f"{Path(tq_fast.__file__).parent}/"


@dataclasses.dataclass
class Traffic:
    """What passes between the CPU and the simulated device, by the line of the package behind it.

    Attributes:
        uploads: copies to the device for which the host does not wait.
        waits: what the host waits for: copies to the host, copies of unpinned memory to the device,
            and results of a size that only the device knows.
        launches: operations on the device; one of the package's counts as one.
    """

    uploads: list[str] = dataclasses.field(default_factory=list)
    waits: list[str] = dataclasses.field(default_factory=list)
    launches: list[str] = dataclasses.field(default_factory=list)

    def take(self) -> Traffic:
        """Return what was counted so far, and begin anew."""
        taken = Traffic(self.uploads, self.waits, self.launches)
        self.uploads, self.waits, self.launches = [], [], []
        return taken


_traffic: Traffic | None = None


def _site() -> str:
    """The innermost line of the package on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_HERE):
            return f"{name.removeprefix(_HERE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


def _count(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add an operation, of which a tensor is on the device, to the traffic that is counted."""
    if _traffic is None:
        return
    if function in _COPIES and _crosses(function, args, kwargs):
        is_quiet = bool(kwargs.get("non_blocking") or True in args[2:3])
        goes_there = not isinstance(args[-1 if len(args) < 3 else 1], Remote)
        (_traffic.uploads if goes_there and is_quiet else _traffic.waits).append(_site())
        return
    if function in _WAITED_FOR or (function in _INDEXING and _asks_the_host(args[1])):
        _traffic.waits.append(_site())
    if not _is_view(function):
        _traffic.launches.append(_site())


def _crosses(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from one device to the other."""
    if function is _aten.copy_.default:
        return isinstance(args[0], Remote) != isinstance(args[1], Remote)
    target = kwargs.get("device")
    return target is not None and isinstance(args[0], Remote) != (torch.device(target) == DEVICE)


def _asks_the_host(indices: Any) -> bool:
    """Whether an index comes from the host, or is a mask, whose number of places it must know."""
    tensors = [x for x in tree_leaves(indices) if isinstance(x, torch.Tensor)]
    return any(not isinstance(x, Remote) or x.dtype == torch.bool for x in tensors)


def _is_view(function: Any) -> bool:
    """Whether an operation only looks at its input in another way."""
    if function in (_aten.detach.default, _aten.lift_fresh.default):
        return True
    returns = function._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


@contextlib.contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what passes between the CPU and the simulated device within the block."""
    global _traffic
    _traffic = Traffic()
    try:
        yield _traffic
    finally:
        _traffic = None


def counted_as_one(
    name: str, function: Callable[..., Any], *args: Any, hides_waits: bool = False, **kwargs: Any
) -> Any:
    """Call `function`, all of whose launches count as one. Its waits count too, unless hidden."""
    global _traffic
    before = _traffic
    if before is None:
        return function(*args, **kwargs)
    before.launches.append(name)
    _traffic = Traffic()
    try:
        return function(*args, **kwargs)
    finally:
        if not hides_waits:
            before.waits += _traffic.waits
        _traffic = before


def ops_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every op of the package count as one launch without a wait, as its kernel would be."""
    for name in ops.describe_backends():
        function = functools.partial(
            counted_as_one, f"ops.{name}", getattr(ops, name), hides_waits=True
        )
        monkeypatch.setattr(ops, name, function)


class Remote(torch.Tensor):
    """A tensor of the simulated device, whose numbers are in `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Remote:
        remote = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        remote.held = held
        return remote

    def __repr__(self, **options: Any) -> str:
        return f"Remote({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `function` on what the tensors hold; give its results the device that they belong to."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    remote = [isinstance(x, Remote) for x in tensors]
    target = kwargs.get("device")
    if any(remote) or (target is not None and torch.device(target) == DEVICE):
        _count(function, args, kwargs)
    if any(remote) and function not in (_aten.copy_.default, _aten._to_copy.default):
        # Indices may be on either device.
        bound = (args[0], *args[2:]) if function in _INDEXING else (args, kwargs)
        strays = [x for x in tree_leaves(bound) if isinstance(x, torch.Tensor) and x.dim() > 0]
        strays = [x for x in strays if not isinstance(x, Remote)]
        if strays:
            shapes = [tuple(x.shape) for x in strays]
            raise RuntimeError(f"{function}: tensors of shapes {shapes} are on the CPU")
    device = kwargs.get("device")
    goes_remote = any(remote) if device is None else torch.device(device) == DEVICE
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    held_args, held_kwargs = tree_map(
        lambda x: x.held if isinstance(x, Remote) else x, (args, kwargs)
    )
    if function is _aten.histc.default and not held_args[0].is_floating_point():
        # A GPU counts integers; a CPU does not.
        counts = function(held_args[0].double(), *held_args[1:], **held_kwargs)
        out = counts.to(held_args[0].dtype)
    else:
        out = function(*held_args, **held_kwargs)
    if not goes_remote or function is _aten._local_scalar_dense.default:
        return out
    # A function that works in place returns the tensor that it was given.
    given = {id(x.held): x for x in tensors if isinstance(x, Remote)}

    def bring(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return given[id(x)] if id(x) in given else Remote(x)

    return tree_map(bring, out)


class _Factories(TorchDispatchMode):
    """A mode that makes tensors on the simulated device where they are asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _with_tensors(index: Any) -> Any:
    """Return `index` with tensors for its lists, which would lose their numbers."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _FromAndToData(TorchFunctionMode):
    """A mode for what the dispatcher never sees: `torch.tensor` on "meta" forgets its data."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], Remote):
            if _traffic is not None:
                _traffic.waits.append(_site())
            return args[0].held.tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        device = kwargs.get("device")
        if function in _FROM_DATA and device is not None and torch.device(device) == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


@contextlib.contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Make the device "meta" hold numbers within the block, and undo that on leaving it."""
    with _FromAndToData(), _Factories():
        yield DEVICE


def move(module: torch.nn.Module) -> torch.nn.Module:
    """Put the parameters and buffers of `module` on the simulated device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = Remote(parameter.detach())
                part._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Remote(buffer)
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                setattr(part, name, Remote(value))
    return module
