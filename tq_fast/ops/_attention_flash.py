"""shared_prefix_attention of prompts, by the flash-attention kernels of other libraries.

A prompt is a single row whose T queries are the last of all its tokens: one causal attention over
[known prefix, new tokens], aligned at the bottom right. Two libraries have such a kernel for CUDA
tensors that returns the log-sum-exp: the package flash_attn (2.6 or later; imported at first use),
and PyTorch itself, whose kernel has no soft-cap and takes head sizes that are multiples of 8 only.

Both take the lengths from the shapes of their inputs. They serve therefore only where the caller
passes no lengths, which says that every buffer is full: reading a length from the device would make
the host wait for it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendRefused

_State = tuple[Tensor, Tensor]

SERVES = "the prompt of a single row"
_DTYPES = (torch.float16, torch.bfloat16)
# What both libraries name as the first cards and the largest heads that their kernels are for.
_FIRST_CAPABILITY = (8, 0)
_LARGEST_HEAD = 256


def refuse_flash_attn(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor | None,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    tree: Tensor | None,
) -> str | None:
    """Say why the package flash_attn does not take these inputs; None when it does."""
    num_queries, head_size = q.shape[2:]
    if prefix_len is not None or branch_len is not None:
        return "flash attention serves full buffers, of which no lengths are given"
    if q.shape[0] != 1 or prefix_k.shape[0] != 1:
        return (
            f"there are {q.shape[0]} rows of {prefix_k.shape[0]} trees; flash attention serves "
            f"{SERVES}"
        )
    if num_queries < 2:
        return f"there is {num_queries} query a row; flash attention serves prompts, of 2 at least"
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}; flash attention takes fp16 and bf16"
    if head_size > _LARGEST_HEAD:
        return f"the head size is {head_size}; flash attention takes at most {_LARGEST_HEAD}"
    # The kernels mask scores with -inf before they multiply by the scale.
    if not scale > 0:
        return f"the scale is {scale}; flash attention takes one above 0"
    for tensor in (q, prefix_k, prefix_v, branch_k, branch_v):
        if tensor.stride(-1) != 1 and head_size > 1:
            return "the last axis of an input is strided"
    return _refuse_device(q.device)


def refuse_torch_flash(
    q: Tensor, *arguments: Any, softcap: float | None, **parameters: Any
) -> str | None:
    """Say why PyTorch's own flash attention does not take these inputs; None when it does."""
    if softcap is not None:
        return "PyTorch's flash attention has no soft-cap on the scores"
    if q.shape[-1] % 8:
        return f"the head size is {q.shape[-1]}; PyTorch's flash attention takes multiples of 8"
    return refuse_flash_attn(q, *arguments, softcap=softcap, **parameters)


def describe_flash() -> dict[str, str | None]:
    """For each library, in the order in which they are asked: None when usable here, or why not."""
    reasons: dict[str, str | None] = {}
    for name, load in (("flash_attn", load_flash_attn), ("PyTorch's flash op", load_torch_flash)):
        try:
            load()
        except BackendRefused as refusal:
            reasons[name] = str(refusal)
        else:
            reasons[name] = _refuse_device(torch.device("cuda"))
    return reasons


def _refuse_device(device: torch.device) -> str | None:
    capability = _capability(device)
    if capability < _FIRST_CAPABILITY:
        return f"the GPU has compute capability {capability}; flash attention needs (8, 0)"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def load_flash_attn() -> Callable[..., _State]:
    """Return attention by the package flash_attn, with the arguments of the reference.

    Raises:
        BackendRefused: the package is not installed, cannot be loaded, or is older than 2.6.
    """
    try:
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        raise BackendRefused(f"flash_attn cannot be imported: {error}") from error
    if "softcap" not in inspect.signature(flash_attn_func).parameters:
        raise BackendRefused("flash_attn is older than 2.6: flash_attn_func takes no softcap")

    def attend(
        q: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_len: None,
        branch_k: Tensor,
        branch_v: Tensor,
        branch_len: None,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        tree: Tensor | None,
    ) -> _State:
        out, lse, _ = flash_attn_func(
            q.transpose(1, 2),
            _joined(prefix_k, branch_k).transpose(1, 2),
            _joined(prefix_v, branch_v).transpose(1, 2),
            softmax_scale=scale,
            causal=True,
            # So many keys to the left of a query's own, and none to the right; -1 is all.
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            return_attn_probs=True,
        )
        return out.transpose(1, 2), lse

    return attend


def load_torch_flash() -> Callable[..., _State]:
    """Return attention by PyTorch's own flash kernel, with the arguments of the reference.

    Raises:
        BackendRefused: this PyTorch was built without it.
    """
    if not torch.backends.cuda.is_flash_attention_available():
        raise BackendRefused("this torch was built without flash attention")
    return _torch_flash


def _torch_flash(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: None,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: None,
    *,
    scale: float,
    softcap: None,
    window: int | None,
    tree: Tensor | None,
) -> _State:
    keys, values = _joined(prefix_k, branch_k), _joined(prefix_v, branch_v)
    # The op below `scaled_dot_product_attention`, which returns no lse and has no window. It reads
    # grouped heads by itself. torch 2.11 to 2.13 agree on these arguments.
    out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        None,
        None,
        q.shape[2],
        keys.shape[2],
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out.transpose(1, 2), lse


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """`[first, second]` along the tokens: a view where the two are neighbours in one buffer.

    A cache stores new keys behind those that it knows, so that a prompt is not copied.
    """
    num_first, num_second = first.shape[2], second.shape[2]
    if num_first == 0:
        return second
    if (
        first.stride() == second.stride()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + num_first * first.stride(2) == second.storage_offset()
    ):
        trees, heads, _, head_size = first.shape
        shape = (trees, heads, num_first + num_second, head_size)
        return first.as_strided(shape, first.stride(), first.storage_offset())
    return torch.cat((first, second), dim=2)
