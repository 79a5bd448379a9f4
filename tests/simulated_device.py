"""A second device for machines that have none: tensors that live on the CPU and say "meta".

Operations between such tensors and those of the CPU are refused, as a GPU refuses them; only copies
pass from one to the other. A whole decode therefore shows whether every tensor is where it belongs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_FROM_DATA = (torch.tensor, torch.as_tensor)
_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)


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
