"""All decoder layers of a model in one call, where they all are of Llama's formula.

Between two layers lies Python of transformers' and of the forest's. Where every layer of a backbone
runs fused (`fused_layers`), a pass over branches is one call of `run_decoder_layers`: the same
kernels in the same order, hence the same numbers, the last norm included where it is of the layers'
kind and nobody watches it. What the backbone does around its layers (embedding, rotary angles, last
norm) is tried: both ways must agree on a few tokens. Prompts, and
backbones that disagree, go layer by layer.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention import active_cache, running
from .cache import BranchPass, ForestCache, PrefillPass
from .fused_layers import Forward, FusedLayers, is_watched
from .linears import Operands, operands_of
from .trials import is_close
from .view import takes

_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = (_WEIGHTS[0], _WEIGHTS[5])
# The name of the cache in what a backbone returns, which is another one from transformers 5.24 on.
_CACHE_OF_OUTPUTS = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)
# Arguments of a backbone that leave what it computes as it is.
_HARMLESS = frozenset({"use_cache", "return_dict"})

# The window of each layer (0: none) of models whose layers were tried in one call; None: they
# disagreed.
_verdicts: weakref.WeakKeyDictionary[nn.Module, list[int] | None] = weakref.WeakKeyDictionary()


class FusedStack:
    """A backbone's forward with all of its layers in one call.

    Args:
        base: the backbone, in a forest's view.
        windows: of the attention of each layer; 0: none.
    """

    def __init__(self, base: Any, windows: list[int]) -> None:
        self.base = base
        self._otherwise: Forward = functools.partial(type(base).forward, base)
        self._layers = list(base.layers)
        self._windows = windows
        parts = [[layer.get_submodule(name) for name in _WEIGHTS] for layer in self._layers]
        self._operands = [
            _norm_operands(part) if name in _NORMS else operands_of(part)
            for layer in parts
            for name, part in zip(_WEIGHTS, layer, strict=True)
        ]
        self._is_linear = [name not in _NORMS for _ in parts for name in _WEIGHTS]
        norms = [layer.get_submodule(name) for layer in self._layers for name in _NORMS]
        # A last norm of the layers' kind is part of the call, unless it gives another dtype.
        is_alike = type(base.norm) is type(norms[0])
        has_dtype = is_alike and base.norm.weight.dtype is norms[0].weight.dtype
        self._last_norm = base.norm if has_dtype else None
        self._eps = [float(norm.variance_epsilon) for norm in norms]
        self._scales = [float(layer.self_attn.scaling) for layer in self._layers]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What the backbone returns, for branches whose layers nobody watches."""
        kept = active_cache()
        given = past_key_values if cache is None else cache
        now = kept.current_pass if kept is not None and kept is given else None
        is_plain = all(value is None or name in _HARMLESS for name, value in kwargs.items())
        if (
            input_ids is None
            or position_ids is None
            or not is_plain
            or kept is None
            or not isinstance(now, BranchPass)
            or not isinstance(now.where, slice)
            or not kept.holds(len(self._layers))
            or any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers)
        ):
            caches = {"past_key_values": past_key_values, "cache": cache}
            kwargs |= {name: value for name, value in caches.items() if value is not None}
            return self._otherwise(input_ids=input_ids, position_ids=position_ids, **kwargs)
        hidden = self.base.embed_tokens(input_ids)
        cos, sin = self.base.rotary_emb(hidden, position_ids)
        operands = [read() for read in self._operands]
        linears = list(itertools.compress(operands, self._is_linear))
        biases = [bias for _, bias, _ in linears]
        scales = [scale for _, _, scale in linears]
        norm = self._last_norm
        if norm is not None and is_watched(norm):
            norm = None
        hidden = torch.ops.tq_fast.run_decoder_layers.default(
            hidden,
            [weight for weight, _, _ in operands],
            # Each list that crosses to C++ takes time.
            biases if any(bias is not None for bias in biases) else [],
            scales if any(scale is not None for scale in scales) else [],
            self._eps,
            None if norm is None else norm._parameters["weight"],
            0.0 if norm is None else norm.variance_epsilon,
            cos,
            sin,
            *kept.views(now),
            now.prefix_len,
            now.branch_len,
            now.tree,
            now.where.start,
            self._scales,
            self._windows,
        )
        if norm is None:
            hidden = self.base.norm(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{_CACHE_OF_OUTPUTS: kept})


def _norm_operands(norm: nn.Module) -> Callable[[], Operands]:
    # Straight from the dict: `norm.weight` is a search through the module.
    parameters: Any = norm._parameters
    return lambda: (parameters["weight"], None, None)


def stack_layers(
    view: nn.Module, source: nn.Module, fused: FusedLayers, backend: str | None
) -> FusedStack | None:
    """Return the stack of the backbone in `view`; None where its layers cannot run in one call."""
    base: Any = getattr(view, "base_model", None)
    layers = list(getattr(base, "layers", None) or ())
    if not layers or layers != [layer for layer, _ in fused.forwards]:
        return None
    if len(layers) != fused.num_layers or any(map(is_watched, (base, *layers))):
        return None
    if [layer.self_attn.layer_idx for layer in layers] != list(range(len(layers))):
        return None
    if not all(hasattr(base, name) for name in ("embed_tokens", "norm", "rotary_emb")):
        return None
    if source not in _verdicts:
        _verdicts[source] = _tried_windows(base, fused, backend)
    windows = _verdicts[source]
    return None if windows is None else FusedStack(base, windows)


@torch.no_grad()
def _tried_windows(base: Any, fused: FusedLayers, backend: str | None) -> list[int] | None:
    """The windows of the layers, if both ways agree over a prefix and two rows of two tokens."""
    argument = "cache" if takes(base, "cache") else "past_key_values"
    cache = ForestCache(num_trees=1, num_rows=2, prefix_capacity=3, branch_capacity=2)
    ids = torch.arange(7) % base.embed_tokens.weight.shape[0]
    seen: list[object] = []

    def call(run: Callable[..., Any], tokens: torch.Tensor, now: PrefillPass | BranchPass) -> Any:
        start = 0 if isinstance(now, PrefillPass) else 3
        positions = torch.arange(start, start + tokens.shape[1]).expand(len(tokens), -1)
        with running(cache, now, backend):
            output = run(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **{argument: cache},
            )
        return output.last_hidden_state

    try:
        for layer, forward in fused.forwards:
            layer.__dict__["forward"] = _noting(forward, seen)
        call(base, ids[None, :3], PrefillPass(0, 0))
        windows = [window or 0 for window in seen]
        if not all(isinstance(window, int) for window in windows):
            return None
        cache.prefix_len[0] = 3
        tree = torch.zeros(2, dtype=torch.int64)
        now = cache.branch_pass(start=0, num_tokens=2, tree=tree)
        results: list[Sequence[torch.Tensor]] = []
        for run in (base, FusedStack(base, windows).forward):  # type: ignore[arg-type]
            output = call(run, ids[3:].view(2, 2), now)
            results.append((output, *cache.save(slice(2), 0, 2)))
    except Exception:
        # A backbone that wants other arguments is of another kind, whatever it raises.
        return None
    finally:
        for layer, _ in fused.forwards:
            layer.__dict__.pop("forward", None)
    agrees = all(is_close(mine, theirs) for theirs, mine in zip(*results, strict=True))
    return windows if agrees else None  # type: ignore[return-value]


def _noting(forward: Forward, seen: list[object]) -> Forward:
    """`forward`, which notes the mask that it is given."""

    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs.get("attention_mask"))
        return forward(*args, **kwargs)

    return noted
