"""The attention function that transformers calls while a forest runs a forward pass.

`forest_attention` is registered with `AttentionInterface` and, since a mask would otherwise become
None in silence, `_forest_mask` with `AttentionMaskInterface`. The mask function builds no mask: it
finds out which pattern the layer asks for (causal, or causal with a sliding window), hands the
window on, and refuses every other pattern by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from .. import env, ops
from ..errors import UnsupportedModel
from ..ops.shared_prefix_attention import refuse_triton
from .cache import BranchPass, ForestCache, PrefillPass
from .view import view_of

NAME = "tq_fast_forest"

_active: ContextVar[tuple[ForestCache, str | None]] = ContextVar("tq_fast_active_forest")

# Arguments of attention functions that change nothing for a causal forward pass without gradient.
_HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_head_mask",
        "head_mask",
        "sliding_window",
    }
)


@dataclasses.dataclass(frozen=True)
class _Unhonoured:
    """Stands for a mask of a pattern that the forest has not: `sentence` says which."""

    sentence: str


def attending(model: PreTrainedModel) -> PreTrainedModel:
    """Return a view of `model` that attends through the forest whose `running` block it is in."""
    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, forest_attention)
        AttentionMaskInterface.register(NAME, _forest_mask)
    return view_of(model, attention=NAME)


@contextlib.contextmanager
def running(
    cache: ForestCache, forward_pass: PrefillPass | BranchPass, backend: str | None
) -> Iterator[None]:
    """Within the block, models that are `attending` attend through `cache`, in this thread."""
    token = _active.set((cache, backend))
    cache.current_pass = forward_pass
    try:
        yield
        cache.check_attended()
    finally:
        cache.current_pass = cache.current_layer = None
        _active.reset(token)


def active_cache() -> ForestCache | None:
    """The cache of the `running` block that this thread is in."""
    active = _active.get(None)
    return active[0] if active is not None else None


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | _Unhonoured | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend `query` `[rows, H_q, T, d]` to the prefix of each row's tree and to its own branch.

    Args:
        module: the attention layer that calls.
        query: new queries, already rotated.
        key: new keys `[rows, H_kv, T, d]`; the cache holds them already.
        value: new values.
        attention_mask: what `_forest_mask` made of the layer's mask.
        scaling: factor on the scores; None: `d ** -0.5`.
        softcap: the scores become `softcap * tanh(score / softcap)`.
        s_aux: attention sinks `[H_q]`, one more logit a head that attends to nothing.

    Returns:
        Output `[rows, T, H_q, d]`, and None for the attention weights.

    Raises:
        UnsupportedModel: the layer asks for something that the forest does not honour.
    """
    for name, value_of in kwargs.items():
        if name not in _HARMLESS and value_of is not None and value_of is not False:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {name!r} to its attention, which the "
                "shared-prefix cache does not honour"
            )
    if isinstance(attention_mask, _Unhonoured):
        raise UnsupportedModel(attention_mask.sentence)
    cache, backend = _active.get()
    now, layer = cache.current_pass, cache.take_layer()
    assert now is not None
    if key.shape[1] != layer.branch_k.shape[1] or value.shape[1] != layer.branch_v.shape[1]:
        raise UnsupportedModel(
            f"{type(module).__name__} attends with {key.shape[1]} key-value heads, but stores "
            f"{layer.branch_k.shape[1]}, which the shared-prefix cache does not honour"
        )
    if isinstance(now, PrefillPass):
        # A prompt is a branch of what is known of it, often of an empty prefix. The cache has
        # stored its keys behind the known ones; all of these views are full, hence no lengths.
        one, end = slice(now.tree, now.tree + 1), now.start + key.shape[2]
        prefix_k, branch_k = layer.prefix_k[one, :, :end].tensor_split((now.start,), dim=2)
        prefix_v, branch_v = layer.prefix_v[one, :, :end].tensor_split((now.start,), dim=2)
        args: tuple[Any, ...] = (query, prefix_k, prefix_v, None, branch_k, branch_v, None)
        tree = None
    else:
        args = (
            query,
            *layer.prefix(now.prefix_len.shape[0], now.max_prefix),
            now.prefix_len,
            *layer.branches(now.rows),
            now.branch_len,
        )
        tree = now.tree
    if _is_on_gpu(query):
        _refuse_detour(module, backend, *args)
    out, lse = ops.shared_prefix_attention(
        *args, scale=scaling, softcap=softcap, window=attention_mask, tree=tree, backend=backend
    )
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux[:, None].to(lse)).unsqueeze(-1).to(out.dtype)
    # The kernels return a view of memory in this order, which is not copied.
    return out.transpose(1, 2).contiguous(), None


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _refuse_detour(module: torch.nn.Module, backend: str | None, *args: Any) -> None:
    """Refuse what only the PyTorch reference of attention takes, which copies prefixes to rows.

    On a GPU that would be the memory and the time that a forest is there to save, at every layer
    and token. Who pins a backend knows what runs.
    """
    if (backend or env.backend()) != "auto":
        return
    reason = refuse_triton(*args)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} cannot attend over the shared-prefix cache on a GPU: "
            f"{reason}. Load the model in a dtype and with heads that the kernel takes, or run it "
            "on the CPU; TQ_FAST_BACKEND=ref runs it here, with a copy of the prefix for every row"
        )


def _forest_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    config: Any,
    use_vmap: bool = False,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> int | _Unhonoured | None:
    """Return the window of a sliding layer, None for a full one, else why it is not honoured.

    A model makes the masks of all patterns that it knows, those of no layer among them: only a
    mask that a layer attends with is refused.
    """
    # Some models make a mask of their own that masks nothing.
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedModel("a padding mask reached the shared-prefix cache, which takes none")
    if mask_function is causal_mask_function:
        return None
    window = getattr(config, "sliding_window", None)
    if use_vmap or window is None or not _is_sliding_causal(mask_function, window):
        return _Unhonoured(
            f"model type {config.model_type!r} asks for an attention pattern other than causal or "
            "causal with a sliding window (chunked, block-wise or bidirectional), which the "
            "shared-prefix cache does not honour"
        )
    return int(window)


def _is_sliding_causal(mask_function: Callable[..., torch.Tensor], window: int) -> bool:
    """Whether `mask_function` lets a query see the `window` keys up to itself and no others."""
    query = 2 * window + 7
    keys = torch.tensor([0, query - window, query - window + 1, query, query + 1])
    zero = torch.zeros_like(keys)
    seen = mask_function(zero, zero, torch.full_like(keys, query), keys)
    return seen.tolist() == [False, False, True, True, False]
