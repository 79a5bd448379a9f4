"""Compile what a launcher would launch, for GPUs that are not here, and read what it takes.

The launcher runs on meta tensors (shapes of any size, no memory) while its kernels are replaced
by recorders; each recorded launch is then compiled with the types and specialisations that Triton
itself would choose, so no signature is written down twice.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capabilities: A100, H100 and H200, B200.
ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may have there, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid and the arguments as the launcher gave them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Resources(NamedTuple):
    """Resources of one kernel: registers a thread, bytes of local and shared memory."""

    kernel: str
    registers: int
    local: int
    shared: int


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._launches.append(Launch(self._kernel, grid, arguments, options))

        return launch


def record(module: ModuleType, launcher: str, *arguments: Any, **parameters: Any) -> list[Launch]:
    """The launches that `module.launcher(...)` makes; its tensors are on the device "meta"."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                patch.setattr(module, name, _Recorder(value, launches))
        getattr(module, launcher)(*arguments, **parameters)
    return launches


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for `sm_<architecture>` as Triton would at this launch, down to machine code."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    options = dict(launch.options)
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind, is_constant, is_aligned = _specialise(value, parameter)
        signature[parameter.name] = kind
        if is_constant:
            constants[(place,)] = value
        if is_aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    return _read_resources(kernel.__name__, compiled)


def _specialise(value: Any, parameter: Any) -> tuple[str, bool, bool]:
    """(type, is a constant, is a multiple of 16), by the rules of Triton's launcher."""
    if parameter.is_constexpr or value is None:
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        # Storages start at multiples of 512 bytes; views of them are tried in the interpreter.
        return _POINTERS[value.dtype], False, True
    if isinstance(value, float):
        return "fp32", False, False
    assert isinstance(value, int), f"{parameter.name} is {value!r}"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True, False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, False, value % 16 == 0 and not parameter.do_not_specialize


def _read_resources(name: str, compiled: Any) -> Resources:
    cubin = Path(compiled.metadata_group[f"{compiled.metadata.name}.cubin"])
    dump = subprocess.run(
        [_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    # Spilled registers live on the stack, in local memory.
    return Resources(name, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def assert_fits(resources: Resources, architecture: int) -> None:
    """No register is spilled, and the shared memory exists."""
    assert 0 < resources.registers <= 255
    assert resources.local == 0, f"{resources} spills on sm_{architecture}"
    assert resources.shared <= SHARED_LIMIT[architecture], f"{resources} on sm_{architecture}"
