"""Flash attention as two libraries have it, in plain PyTorch, for machines without a GPU.

Layouts, defaults, the corner at which a causal mask is aligned, and what comes back are those of
flash_attn 2 and of `aten::_flash_attention_forward` for CUDA tensors.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tq_fast.ops import _attention_flash, _dispatch
from tq_fast.ops.shared_prefix_attention import _OP

FLASH_ATTN = "flash_attn"
TORCH = "torch"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q and out are `[N, T, H, d]`, k and v `[N, S, H_kv, d]`, lse is fp32 `[N, H, T]`."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    scores = q.double().transpose(1, 2) @ keys.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        hidden |= key > position + right
    if left >= 0:
        hidden |= key < position - left
    scores = scores.masked_fill(hidden, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    return out.to(q.dtype), scores.logsumexp(-1).float()


class FlashStandIns:
    """Puts the stand-ins in the libraries' places, and lets CPU tensors ask for them first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.calls: list[str] = []
        # A machine on which neither library is there, and whose CPU tensors are those of a GPU.
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setitem(_dispatch._BACKENDS_OF_DEVICE, "cpu", ("cuda", "cpu"))
        monkeypatch.setattr(_attention_flash, "_capability", lambda device: (9, 0))
        _OP.forget()

    def install(self, name: str) -> None:
        if name == FLASH_ATTN:
            self._install_flash_attn()
        else:
            self._install_torch()
        _OP.forget()

    def _install_flash_attn(self) -> None:
        def flash_attn_func(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            dropout_p: float = 0.0,
            softmax_scale: float | None = None,
            causal: bool = False,
            window_size: tuple[int, int] = (-1, -1),
            softcap: float = 0.0,
            alibi_slopes: Tensor | None = None,
            deterministic: bool = False,
            return_attn_probs: bool = False,
        ) -> Any:
            self.calls.append(FLASH_ATTN)
            scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
            out, lse = attend(q, k, v, scale, causal, *window_size, softcap)
            return (out, lse, None) if return_attn_probs else out

        module = types.ModuleType("flash_attn")
        module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
        module.__version__ = "2.8.3"  # type: ignore[attr-defined]
        self.monkeypatch.setitem(sys.modules, "flash_attn", module)

    def _install_torch(self) -> None:
        """Give PyTorch's own operator, which has none for the CPU, a kernel there."""

        def forward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cum_seq_q: Tensor | None,
            cum_seq_k: Tensor | None,
            max_q: int,
            max_k: int,
            dropout_p: float,
            is_causal: bool,
            return_debug_mask: bool,
            *,
            scale: float | None = None,
            window_size_left: int | None = None,
            window_size_right: int | None = None,
            **others: Any,
        ) -> tuple[Tensor, ...]:
            self.calls.append(TORCH)
            assert cum_seq_q is None and cum_seq_k is None
            assert (max_q, max_k) == (query.shape[1], key.shape[1])
            assert query.shape[-1] % 8 == 0
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            left, right = (-1 if x is None else x for x in (window_size_left, window_size_right))
            out, lse = attend(query, key, value, scale, is_causal, left, right)
            return out, lse, query.new_empty(0), query.new_empty(0), query.new_empty(0)

        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_forward", forward, "CPU")
        self.library = library
        self.monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def remove(self) -> None:
        if hasattr(self, "library"):
            self.library._destroy()
        self.monkeypatch.undo()
        _OP.forget()
