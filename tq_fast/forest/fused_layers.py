"""Decoder layers of Llama's formula in two calls and an attention, where few rows go through them.

With few rows, a layer of transformers spends as long between its matrix products as in them: some
sixty small tensor operations a layer. `ops.project_qkv` and `ops.finish_decoder_layer` do the same,
rounded where the modules round.

A layer that has the parts of the formula is tried: the formula and the layer's own forward run on
the same few hidden states, over a prefix, with and without a sliding window, and must agree in
what they return and in what they store. A layer that disagrees, or is adapted, offloaded or hooked,
or quantised otherwise than to int8 weights (`linears.py`), runs as it is. The trial sees positions
below ten: what a layer does otherwise at positions far beyond is not seen.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import warn_caller
from ..ops._dispatch import unchecked_kernel
from .attention import forest_attention, running
from .cache import BranchPass, ForestCache, PrefillPass
from .linears import (
    has_int8_weight,
    is_int8_linear,
    is_plain_linear,
    operands_of,
    product_forward,
)
from .trials import is_close
from .view import seen_modules, takes

Forward = Callable[..., torch.Tensor]

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")

# Why the formula may not stand in for a layer that was tried; None: it may.
_verdicts: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
# Models whose layers were told of.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_OTHER_PARTS = "have other parts than the formula"
_OTHER_PRODUCT = "have int8 weights whose product is another, by a trial on a few rows"
_DISAGREES = "compute something else than the fused formula, by a trial on a few tokens"


@dataclasses.dataclass(frozen=True)
class FusedLayers:
    """The decoder layers of a model that may run fused, and why the others may not.

    Attributes:
        forwards: a layer of the view, and what stands in for its forward.
        num_layers: decoder layers of the model.
        reasons: for the layers that run as they are, each reason with the number of its layers.
    """

    forwards: list[tuple[nn.Module, Forward]]
    num_layers: int
    reasons: Counter[str]

    def __str__(self) -> str:
        text = f"{len(self.forwards)} of {self.num_layers} decoder layers run fused"
        num_int8 = sum(any(map(is_int8_linear, layer.modules())) for layer, _ in self.forwards)
        if num_int8 > 0:
            text += f", {num_int8} with int8 weights"
        others = [f"{count} {reason}" for reason, count in self.reasons.most_common()]
        return f"{text} ({'; '.join(others)})" if others else text


def fuse_layers(view: nn.Module, source: nn.Module, backend: str | None) -> FusedLayers:
    """Find the decoder layers of `source` that may run fused in its `view`."""
    config = getattr(source, "config", None)
    text_config = config.get_text_config() if config is not None else None
    num_layers = getattr(text_config, "num_hidden_layers", 0)
    found = FusedLayers([], num_layers, Counter())
    rotary = getattr(getattr(view, "base_model", None), "rotary_emb", None)
    layer: Any
    for layer, original in zip(view.modules(), seen_modules(source), strict=True):
        if not isinstance(getattr(layer, "self_attn", None), nn.Module):
            continue
        reason = _refusal(layer)
        if reason is None:
            forward = _forward_of(layer)
            if original not in _verdicts:
                agrees = rotary is not None and _agrees(layer, forward, rotary, backend)
                _verdicts[original] = None if agrees else _DISAGREES
            reason = _verdicts[original]
        if reason is None:
            found.forwards.append((layer, forward))
        else:
            found.reasons[reason] += 1
    left = found.num_layers - len(found.forwards) - found.reasons.total()
    if left > 0:
        found.reasons[_OTHER_PARTS] += left
    if found.reasons.keys() - {_OTHER_PARTS} and source not in _warned:
        _warned.add(source)
        warn_caller(f"{type(source).__name__}: {found}; the others run as they are, more slowly")
    return found


def _refusal(layer: Any) -> str | None:
    """Why a layer cannot be of the formula, from its parts; None: it is to be tried."""
    attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
    linears, norms = [], [getattr(layer, name, None) for name in _NORMS]
    for part, names in zip((attention, mlp), _LINEARS, strict=True):
        linears += [getattr(part, name, None) for name in names]
    eps = [getattr(norm, "variance_epsilon", None) for norm in norms]
    activation = getattr(mlp, "act_fn", None)
    is_silu = type(activation) is nn.SiLU or type(activation).__name__ == "SiLUActivation"
    has_parts = None not in (*linears, *eps, getattr(attention, "layer_idx", None))
    if not has_parts or not is_silu or not isinstance(attention.scaling, float):
        return _OTHER_PARTS
    for linear in linears:
        if has_int8_weight(linear) and not is_int8_linear(linear):
            return _OTHER_PRODUCT
        if not is_plain_linear(linear) and not is_int8_linear(linear):
            return f"have weights that are no plain linear layer on the CPU ({_kind(linear)})"
    dtypes = {part.weight.dtype for part in (*linears, *norms) if part is not None}
    if len(dtypes) > 1:
        return "have weights of several dtypes"
    if any(is_watched(module) for module in layer.modules() if module is not layer):
        return "have hooks, or a forward of their own, in their parts"
    return None


def _kind(module: object) -> str:
    weight = getattr(module, "weight", None)
    is_special = type(module) is nn.Linear and type(weight) is not nn.Parameter
    return type(weight if is_special else module).__name__


def is_watched(module: nn.Module) -> bool:
    """Whether somebody counts on the module itself being called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@torch.no_grad()
def _agrees(layer: Any, forward: Forward, rotary: nn.Module, backend: str | None) -> bool:
    """Whether `forward` gives what `layer` gives, over a prefix and two rows of two tokens."""
    weight = layer.self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 3, weight.shape[1], generator=generator, dtype=torch.float32)
    # Beside small hidden states, what the layer adds is large; large ones show a bound on them.
    hidden[0] *= 0.05
    hidden[1] *= 8.0
    hidden = hidden.to(weight.dtype)
    argument = "cache" if takes(layer, "cache") else "past_key_values"
    # Products with int8 weights were tried by themselves: a quantiser's own are rounded more often,
    # and a layer of those would hide what else it does otherwise.
    native = unchecked_kernel("few_rows_linear", backend)
    assert native is not None, "no native library"
    int8_linears = [module for module in layer.modules() if is_int8_linear(module)]
    for window in (None, 2):
        cache = ForestCache(num_trees=1, num_rows=2, prefix_capacity=3, branch_capacity=2)

        def call(run: Forward, states: torch.Tensor, now: PrefillPass | BranchPass) -> object:
            start = 0 if isinstance(now, PrefillPass) else 3
            positions = torch.arange(start, start + states.shape[1]).expand(len(states), -1)
            with running(cache, now, backend):  # noqa: B023
                return run(
                    states,
                    attention_mask=window,  # noqa: B023
                    position_ids=positions,
                    use_cache=True,
                    position_embeddings=rotary(states, positions),
                    **{argument: cache},  # noqa: B023
                )

        for linear in int8_linears:
            linear.__dict__["forward"] = product_forward(linear, native)
        try:
            call(layer.forward, hidden[2:], PrefillPass(0, 0))
            cache.prefix_len[0] = 3
            tree = torch.zeros(2, dtype=torch.int64)
            now = cache.branch_pass(start=0, num_tokens=2, tree=tree)
            results = []
            for run in (layer.forward, forward):
                out = call(run, hidden[:2, :2], now)
                results.append((out, *cache.save(slice(2), 0, 2)))
        except Exception:
            # A layer that wants other arguments is of another formula, whatever it raises.
            return False
        finally:
            for linear in int8_linears:
                del linear.__dict__["forward"]
        if not all(is_close(mine, theirs) for theirs, mine in zip(*results, strict=True)):
            return False
    return True


def _forward_of(layer: Any) -> Forward:
    attention, mlp = layer.self_attn, layer.mlp
    first_norm, second_norm = (getattr(layer, name) for name in _NORMS)
    layer_idx, scaling = attention.layer_idx, attention.scaling
    project_qkv = unchecked_kernel("project_qkv", "cpu")
    finish_decoder_layer = unchecked_kernel("finish_decoder_layer", "cpu")
    assert project_qkv is not None and finish_decoder_layer is not None, "no native library"
    q_proj, k_proj, v_proj, o_proj = (operands_of(getattr(attention, name)) for name in _LINEARS[0])
    gate_proj, up_proj, down_proj = (operands_of(getattr(mlp, name)) for name in _LINEARS[1])
    # Straight from the dicts: `layer.input_layernorm.weight` is two searches through modules.
    norm_in, norm_out = first_norm._parameters, second_norm._parameters
    first_eps, second_eps = first_norm.variance_epsilon, second_norm.variance_epsilon

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        q, k, v = project_qkv(
            hidden_states,
            norm_in["weight"],
            q_proj(),
            k_proj(),
            v_proj(),
            *position_embeddings,
            eps=first_eps,
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = (cache if past_key_values is None else past_key_values).update(k, v, layer_idx)
        attended, _ = forest_attention(attention, q, k, v, attention_mask, scaling, **kwargs)
        return finish_decoder_layer(
            attended.flatten(2),
            hidden_states,
            o_proj(),
            norm_out["weight"],
            gate_proj(),
            up_proj(),
            down_proj(),
            eps=second_eps,
        )

    return forward
