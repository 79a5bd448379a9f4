"""Tiny models of many architectures, with random weights that make their outputs anything but flat.

transformers initialises with a standard deviation of 0.02, from which a tiny model predicts a
nearly uniform law: arg max would then test rounding. Here every matrix keeps the scale of what
passes through it, and the LM head spreads the logits over several nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

VOCAB_SIZE = 150
# Prompts of the tests are longer, and so is a branch: a window of this size cuts both.
WINDOW = 6

_SIZE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # A tied LM head would predict the token that it was given.
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}

# For each architecture: its configuration class, and the fields that it needs beyond `_SIZE`.
LANGUAGE_MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "mistral-sliding": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    # This window reaches only one token past those of a branch itself.
    "mistral-narrow": (MistralConfig, {**_GROUPED, "sliding_window": 3}),
    "gpt-neox": (GPTNeoXConfig, {"intermediate_size": 48}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen2-sliding": (
        Qwen2Config,
        {
            **_GROUPED,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3Config, {**_GROUPED, **_HEAD}),
    "gemma": (GemmaConfig, {**_GROUPED, **_HEAD}),
    "gemma2": (
        Gemma2Config,
        {
            **_GROUPED,
            **_HEAD,
            **_SLIDING_AND_FULL,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 9,
            # These soft-caps are low enough to bend the scores and logits of these weights.
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_GROUPED,
            **_HEAD,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 9,
        },
    ),
    "phi3": (Phi3Config, _GROUPED),
    "phi3-sliding": (Phi3Config, {**_GROUPED, "sliding_window": WINDOW}),
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (GPT2Config, {"n_inner": 48}),
    "mixtral": (MixtralConfig, {**_GROUPED, **_EXPERTS}),
    "olmo2": (Olmo2Config, _GROUPED),
    "starcoder2": (Starcoder2Config, {**_GROUPED, "sliding_window": WINDOW}),
    "cohere": (CohereConfig, {**_GROUPED, "logit_scale": 0.5}),
    "granite": (
        GraniteConfig,
        {**_GROUPED, "attention_multiplier": 0.5, "logits_scaling": 0.7},
    ),
    "gpt-oss": (
        GptOssConfig,
        {**_GROUPED, **_HEAD, **_EXPERTS, **_SLIDING_AND_FULL, "sliding_window": WINDOW},
    ),
}


def language_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Return a language model of architecture `name`; `overrides` replace configuration fields."""
    return _build(AutoModelForCausalLM, name, seed, dtype, overrides)


def classifier(
    name: str,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    num_labels: int = 1,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a causal sequence classifier of architecture `name`."""
    overrides = {"num_labels": num_labels, **overrides}
    return _build(AutoModelForSequenceClassification, name, seed, dtype, overrides)


def has_classifier(name: str) -> bool:
    """Return whether transformers has a causal sequence classifier of this architecture."""
    return LANGUAGE_MODELS[name][0] in AutoModelForSequenceClassification._model_mapping


def spread_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every weight of `model` anew, as the docstring of this file says."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.2 * noise.to(parameter.dtype)
                continue
            gain = 3.0 if head is not None and parameter is head.weight else 1.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * gain / math.sqrt(parameter.shape[-1]))
    return model


def _build(
    auto_class: Any, name: str, seed: int, dtype: torch.dtype, overrides: dict[str, Any]
) -> PreTrainedModel:
    config_class, needed = LANGUAGE_MODELS[name]
    config = config_class(**{**_SIZE, **needed, **overrides})
    # Eager attention honours every feature, soft-caps and sinks too.
    model = auto_class.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return spread_weights(model, seed).to(dtype).eval()
