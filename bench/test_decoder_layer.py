"""A decoder layer of Llama's shape with few rows: its modules beside the two ops for them.

Attention is left out, because it is the same call in both. The modules are the norms, the seven
linear layers, the rotation and the gated MLP, as transformers runs them one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from bench.ceilings import Work
from bench.side_by_side import time_provider
from tq_fast.ops import finish_decoder_layer, project_qkv

_BYTES = 128 << 20
_CONFIG = LlamaConfig(hidden_size=768, num_attention_heads=12, intermediate_size=2048)


def by_modules(layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    q, k, v = (
        linear(normed).unflatten(-1, (-1, 64)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    x = x + attention.o_proj((q + k + v).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def by_ops(layer: LlamaDecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    qkv = ((part.weight, None) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = project_qkv(x, norms[0].weight, *qkv, cos, sin, eps=norms[0].variance_epsilon)
    return finish_decoder_layer(
        (q + k + v).flatten(2),
        x,
        (attention.o_proj.weight, None),
        norms[1].weight,
        *((part.weight, None) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        eps=norms[1].variance_epsilon,
    )


PROVIDERS: dict[str, Callable[..., Tensor]] = {"modules": by_modules, "ours": by_ops}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 10, 40, 200])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_decoder_layer(benchmark, figure, provider, num_rows, dtype) -> None:
    torch.manual_seed(0)
    first = LlamaDecoderLayer(_CONFIG, 0).to(dtype).eval()
    layer_bytes = sum(parameter.nbytes for parameter in first.parameters())
    count = _BYTES // layer_bytes + 1
    layers = [first, *(LlamaDecoderLayer(_CONFIG, 0).to(dtype).eval() for _ in range(count - 1))]
    x = torch.randn(num_rows, 1, 768).to(dtype)
    angles = torch.randn(num_rows, 1, 64)
    inputs = x, angles.cos().to(dtype), angles.sin().to(dtype)
    function = PROVIDERS[provider]
    with torch.inference_mode():
        expected = by_modules(first, *inputs)
        torch.testing.assert_close(function(first, *inputs), expected, rtol=5e-2, atol=5e-2)
    time_provider(
        benchmark,
        figure,
        provider,
        f"decoder layer, {num_rows} rows, {dtype}",
        function,
        itertools.cycle([(layer, *inputs) for layer in layers]),
        rounds=4 * count,
        warmup_rounds=4,
        work=Work(layer_bytes, 2 * num_rows * layer_bytes // dtype.itemsize),
        dtype=dtype,
    )
