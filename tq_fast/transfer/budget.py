"""The choice of how many prompts and roll-outs share a forest, within a budget of memory."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import InvalidArgument, warn_caller


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The number of prompts and of roll-outs that run together.

    Attributes:
        num_prompts: prompts of the forest.
        max_rows: most roll-outs that run at a time, over all prompts.
    """

    num_prompts: int
    max_rows: int

    def halved(self) -> BatchShape | None:
        """Return half as many prompts, or half the roll-outs of a single one; None below one."""
        if self.num_prompts > 1:
            half = -(-self.num_prompts // 2)
            return BatchShape(half, max(1, self.max_rows * half // self.num_prompts))
        return BatchShape(1, self.max_rows // 2) if self.max_rows > 1 else None

    def __str__(self) -> str:
        return f"{self.num_prompts} prompts and {self.max_rows} roll-outs at a time"


def smaller_after(error: torch.OutOfMemoryError, size: BatchShape) -> BatchShape:
    """Return the shape to go on with after running out of memory with `size`, and warn.

    Raises:
        torch.OutOfMemoryError: `error` itself, where no smaller shape is left.
    """
    smaller = size.halved()
    if smaller is None:
        raise error
    warn_caller(f"out of memory with {size}; going on with {smaller} ({error})")
    # This call does nothing unless a CUDA device is in use.
    torch.cuda.empty_cache()
    return smaller


@dataclasses.dataclass(frozen=True)
class MemoryPerPrompt:
    """Bytes of one prompt and of one roll-out, KV of all models and logits included.

    Attributes:
        per_prompt: bytes of a prompt, which all its roll-outs share.
        per_row: bytes of a roll-out.
        rows_per_prompt: roll-outs of a prompt, k x n.
    """

    per_prompt: int
    per_row: int
    rows_per_prompt: int


def check_sizes(batch_size: object, memory_budget: object) -> None:
    """Refuse a `batch_size` or a `memory_budget` that is no positive integer.

    Raises:
        InvalidArgument: the message names the argument and its value.
    """
    if not _is_positive_int(batch_size):
        raise InvalidArgument(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if memory_budget is not None and not _is_positive_int(memory_budget):
        raise InvalidArgument(
            f"memory_budget must be a number of bytes, or None, got {memory_budget!r}"
        )


def fit_forest(needed: MemoryPerPrompt, *, batch_size: int, memory_budget: int) -> BatchShape:
    """Return the largest forest of at most `batch_size` prompts that `memory_budget` bytes hold.

    A prompt that does not fit with all its roll-outs gets them in several waves.

    Raises:
        InvalidArgument: not even one roll-out at a time fits.
    """
    rows = needed.rows_per_prompt
    num_prompts = min(batch_size, memory_budget // (needed.per_prompt + rows * needed.per_row))
    if num_prompts:
        return BatchShape(num_prompts, num_prompts * rows)
    max_rows = (memory_budget - needed.per_prompt) // needed.per_row
    if max_rows < 1:
        least = needed.per_prompt + needed.per_row
        raise InvalidArgument(
            f"memory_budget must be at least {least} bytes for the longest of these prompts and "
            f"one roll-out, got {memory_budget}"
        )
    return BatchShape(1, max_rows)


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
