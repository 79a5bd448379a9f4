"""Copies between the host and a device, many tensors in one.

On a GPU every copy to the host makes the host wait until the device has come that far, and so does
a copy out of memory that is not pinned. A step of decoding therefore packs what it tells the device
into one copy of pinned memory, and what it asks of the device into another copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies of CPU tensors on `device`; the host does not wait.

    Where `device` is the CPU, they are the tensors themselves.
    """
    if device.type == "cpu":
        return tensors
    size = sum(tensor.nbytes for tensor in tensors)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for piece, tensor in zip(_pieces(packed, tensors), tensors, strict=True):
        piece.copy_(tensor)
    # PyTorch gives the pinned memory to nobody else before the copy out of it has ended.
    return tuple(_pieces(packed.to(device, non_blocking=True), tensors))


def download(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies on the CPU; the host waits once for every device that a tensor is on.

    Those that are on the CPU are returned themselves.
    """
    found = list(tensors)
    for device in {tensor.device: None for tensor in tensors if tensor.device.type != "cpu"}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        there = [tensors[i] for i in places]
        flat = [there[i].reshape(-1).view(torch.uint8) for i in _order(there)]
        for i, piece in zip(places, _pieces(torch.cat(flat).cpu(), there), strict=True):
            found[i] = piece
    return tuple(found)


def _order(tensors: Sequence[Tensor]) -> list[int]:
    """The order in which tensors are packed: large items first, so that each lies aligned."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)


def _pieces(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `packed` that `tensors` take, as views of their dtypes and shapes."""
    pieces, start = [packed] * len(tensors), 0
    for i in _order(tensors):
        end = start + tensors[i].nbytes
        pieces[i] = packed[start:end].view(tensors[i].dtype).view(tensors[i].shape)
        start = end
    return pieces
