"""Finds and loads the native libraries, once, on first use; what is missing is said in words.

``_tq_fast_cpu.so`` holds the schemas and the CPU kernels, ``_tq_fast_cuda.so`` the CUDA kernels
(loaded only where a GPU is visible). ``tq_fast._common``, the shared headers as a Python module for
tests, is in checkouts alone: it would tie a wheel to one version of Python.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

import torch

LibraryName = Literal["cpu", "cuda"]
_Function = TypeVar("_Function")
_PACKAGE_FOLDER = Path(__file__).resolve().parent
# torch leaves this function without types.
_load_library: Callable[[str], None] = torch.ops.load_library


def constant_when_compiling(function: _Function) -> _Function:
    """As torch.compiler.assume_constant_result, which would import torch._dynamo, a second, now."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def _load(name: LibraryName) -> str | None:
    path = _PACKAGE_FOLDER / f"_tq_fast_{name}.so"
    if not path.is_file():
        return (
            f"the {name} library was not built ({path.name} is not in the package); "
            "reinstall from the source distribution (pip install --no-binary tq-fast) with a C++ "
            f"compiler and torch present and TQ_FAST_BUILD={name}"
        )
    try:
        _load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


@constant_when_compiling
@functools.cache
def cpu_refusal() -> str | None:
    """Why the CPU library cannot serve: a sentence, or None once it is loaded."""
    return _load("cpu")


@constant_when_compiling
@functools.cache
def cuda_refusal() -> str | None:
    """Why the CUDA library cannot serve: a sentence, or None once it is loaded."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # The schemas live in the CPU library.
    return cpu_refusal() or _load("cuda")


def cpu_name() -> str:
    """The processor's model name, for tables of figures."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_isa() -> str | None:
    """Return what the CPU kernels use here, base, avx2 or avx512; None where they are not built."""
    return None if cpu_refusal() else torch.ops.tq_fast.cpu_isa()


def cpu_has(trait: Literal["avx512_bf16", "amx", "amd"]) -> bool:
    """Whether the processor has a feature, or is of a make, that kernels are chosen by."""
    return cpu_refusal() is None and torch.ops.tq_fast.cpu_has(trait)


@functools.cache
def load_common() -> ModuleType:
    """The module over csrc/common; ImportError with the reason where it was not built."""
    try:
        return importlib.import_module("tq_fast._common")
    except ImportError as error:
        raise ImportError(
            f"tq_fast._common was not built or cannot be loaded ({error}); only tests need it, and "
            "`pip install -e .` builds it with a C++ compiler and Python's development headers"
        ) from error
