"""The device and the options of a launch: Triton launches on whatever device is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current; does nothing for CPU tensors (Triton's interpreter)."""
    # A compiled graph sets the device itself.
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def all_registers() -> dict[str, int]:
    """Launch options that let a thread have all registers that it can.

    Left to itself, the assembler of Triton 3.6 spills a few of them to let one more program into a
    multiprocessor. torch.compile knows no such option.
    """
    return {} if torch.compiler.is_compiling() else {"maxnreg": 255}
