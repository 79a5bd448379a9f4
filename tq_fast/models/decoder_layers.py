"""Decoder layers of Llama's formula in two calls and an attention, where few rows go through them.

With few rows, a layer of transformers spends as long between its matrix products as in them: some
sixty small tensor operations a layer. `ops.project_qkv` and `ops.finish_decoder_layer` do the same,
rounded where the modules round.

A layer qualifies by the text of its code: the statements of its forward, and of those of its parts,
are digested and compared with those of transformers' Llama, Mistral and Qwen2 that the ops were
written after. A class that differs anywhere runs as it is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable

import torch
from torch import nn

from ..cache.attention import forest_attention
from ..ops._dispatch import unchecked_kernel

# Digests of the statements of each part. The three forms of attention differ in how they hand on a
# sliding window, which the forest takes from the mask.
FORMULAS = {
    "layer": ("b139d1b607c01194",),
    "attention": ("edb09e4cdb72174c", "ea92a9846ca1ecb5", "992c57d97163d600"),
    "mlp": ("5b8abf7af12a4b42",),
    "norm": ("50b8139e32eaccc8",),
    "rotary": ("257620718ecff20c",),
    "half": ("b92c1a98279c25d0",),
}


def fused_forward(layer: nn.Module) -> Callable[..., torch.Tensor] | None:
    """What may stand in for the forward of `layer` while a forest runs; None: nothing may."""
    parts = _parts(layer)
    if parts is None:
        return None
    attention, mlp, norms = parts
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    dtypes = {module.weight.dtype for module in (*linears, *norms)}
    if not all(map(is_plain_linear, linears)) or len(dtypes) > 1 or not _is_silu(mlp.act_fn):
        return None
    inside = [module for module in layer.modules() if module is not layer]
    if any(_is_watched(module) for module in inside):
        return None
    return _forward_of(attention, mlp, *norms)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer itself, none derived from it, its weights on the CPU."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
    )


def _parts(layer: nn.Module) -> tuple[nn.Module, nn.Module, list[nn.Module]] | None:
    """Attention, MLP and the two norms of a layer of Llama's formula; None for any other."""
    if not _follows("layer", type(layer)):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if (
        _follows("attention", type(attention))
        and _rotates_halves(type(attention))
        and _follows("mlp", type(mlp))
        and all(_follows("norm", type(norm)) for norm in norms)
    ):
        return attention, mlp, norms
    return None


@functools.cache
def _follows(part: str, kind: type[nn.Module]) -> bool:
    return digest(kind.forward) in FORMULAS[part]


@functools.cache
def _rotates_halves(kind: type[nn.Module]) -> bool:
    module = sys.modules[kind.__module__]
    rotary = getattr(module, "apply_rotary_pos_emb", None)
    half = getattr(module, "rotate_half", None)
    return digest(rotary) in FORMULAS["rotary"] and digest(half) in FORMULAS["half"]


def digest(function: object) -> str:
    """Of the statements of `function`: comments, annotations and the docstring do not count."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
    definition = ast.parse(textwrap.dedent(source)).body[0]
    statements = getattr(definition, "body", [])
    if statements and isinstance(statements[0], ast.Expr):
        statements = statements[1:]
    text = "\n".join(ast.unparse(statement) for statement in statements)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_silu(activation: nn.Module) -> bool:
    return type(activation) is nn.SiLU or type(activation).__name__ == "SiLUActivation"


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody counts on the module itself being called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _forward_of(
    attention: nn.Module, mlp: nn.Module, first_norm: nn.Module, second_norm: nn.Module
) -> Callable[..., torch.Tensor]:
    layer_idx, scaling = attention.layer_idx, attention.scaling
    project_qkv = unchecked_kernel("project_qkv", "cpu")
    finish_decoder_layer = unchecked_kernel("finish_decoder_layer", "cpu")
    # Straight from the dicts: `attention.q_proj.weight` is two searches through modules.
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, norm_in, norm_out = (
        module._parameters
        for module in (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            *(first_norm, second_norm),
        )
    )
    first_eps, second_eps = first_norm.variance_epsilon, second_norm.variance_epsilon

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: object = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        q, k, v = project_qkv(
            hidden_states,
            norm_in["weight"],
            (q_proj["weight"], q_proj["bias"]),
            (k_proj["weight"], k_proj["bias"]),
            (v_proj["weight"], v_proj["bias"]),
            *position_embeddings,
            eps=first_eps,
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = past_key_values.update(k, v, layer_idx)
        attended, _ = forest_attention(attention, q, k, v, attention_mask, scaling, **kwargs)
        return finish_decoder_layer(
            attended.flatten(2),
            hidden_states,
            (o_proj["weight"], o_proj["bias"]),
            norm_out["weight"],
            (gate_proj["weight"], gate_proj["bias"]),
            (up_proj["weight"], up_proj["bias"]),
            (down_proj["weight"], down_proj["bias"]),
            eps=second_eps,
        )

    return forward
