"""Weights and KV in huge pages, where they are in main memory and the system has them.

A pass over a few rows is as fast as memory is read, and with pages of 4 kB the processor spends
much of that time looking up where they lie (bench/test_huge_pages.py measures it). Linux gives
pages of 2 MB to new memory that asks (`MADV_HUGEPAGE`), and gathers what is there already
(`MADV_COLLAPSE`, Linux 6.1), which takes some seconds a GB, once a model. No number changes. Where
the system refuses, memory stays as it is.

transformers leaves weights in the file that they were read from, unless their dtype is to change,
and the system has no huge pages for files. Those of models that tq_fast loads are copied.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
# Blocks of memory that lie so near to each other are taken together: what is between them belongs
# to the allocator.
_GAP = 1 << 13

# Models whose weights were gathered.
_gathered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def gather_weights(model: nn.Module) -> None:
    """Put the weights of `model` into huge pages, once."""
    if model in _gathered:
        return
    _gathered.add(model)
    weights = [weight for weight in model.parameters() if weight.device.type == "cpu"]
    _advise(weights, _MADV_COLLAPSE)


def copy_from_files(model: nn.Module) -> None:
    """Give the weights of `model` that lie in mapped files memory of their own, if there is any.

    Nobody else may hold these weights: who has a view of one would not see later changes.
    """
    if _page_size() == 0:
        return
    files = _mapped_files()
    weights = [
        weight
        for weight in model.parameters()
        if type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and any(begin <= weight.data_ptr() < end for begin, end in files)
    ]
    if 2 * sum(weight.nbytes for weight in weights) > _available_bytes():
        return
    for weight in weights:
        own = torch.empty_like(weight.data)
        ask_for_huge_pages([own])
        weight.data = own.copy_(weight.data)


def ask_for_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Have new tensors, whose memory nobody has touched, lie in huge pages."""
    _advise([tensor for tensor in tensors if tensor.device.type == "cpu"], _MADV_HUGEPAGE)


def _advise(tensors: Sequence[torch.Tensor], advice: int) -> None:
    size = _page_size()
    if size == 0:
        return
    madvise = _madvise()
    for begin, end in _runs(tensors):
        first, last = -(-begin // size) * size, end // size * size
        # Block by block, since one that the system does not give would end the others.
        for at in range(first, last, size):
            madvise(at, size, advice)


def _runs(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where the memory of the tensors begins and ends; neighbours are one run."""
    # A subclass, such as one of quantised weights, may have no memory of its own.
    plain = [t for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and t.nbytes > 0]
    blocks = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in plain})
    runs: list[tuple[int, int]] = []
    for begin, num_bytes in blocks:
        if runs and begin - runs[-1][1] <= _GAP:
            runs[-1] = runs[-1][0], max(runs[-1][1], begin + num_bytes)
        else:
            runs.append((begin, begin + num_bytes))
    return runs


def _mapped_files() -> list[tuple[int, int]]:
    """Where memory of this process that is mapped from files begins and ends."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            begin, end = addresses.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _available_bytes() -> int:
    """Bytes of memory that new data may take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


@functools.cache
def _page_size() -> int:
    """Bytes of a huge page; 0 where the system has none, or is told never to use them."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        enabled = (_SETTINGS / "enabled").read_text()
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
    except OSError:
        return 0
    return 0 if "[never]" in enabled else size


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
