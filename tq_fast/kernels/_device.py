"""Where a launcher runs its kernels: Triton launches on the current device, not the tensor's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `tensor` current; nothing for CPU tensors (Triton's interpreter)."""
    # A compiled graph sets the device itself.
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(tensor.device)
    return nullcontext()
