"""Fingerprints of models: short words that are equal where two models are the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forest.view import is_adapted

# About so many numbers of each weight enter the fingerprint of a model.
_NUM_SAMPLES = 64


def fingerprint_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    rounded_to: torch.dtype = torch.float32,
) -> str:
    """Hash a model's configuration, some numbers of every weight, and its tokenizer.

    The hash is cheap for large models and changes with any training; the folder does not enter it.

    Args:
        model: the model.
        tokenizer: its tokenizer, where that is to count.
        rounded_to: what weights are rounded to before; with bfloat16 a model has one fingerprint
            however it was loaded.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    if rounded_to is torch.bfloat16:
        config.pop("dtype", None)
    digest = hashlib.blake2b(
        json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8
    )
    offloaded = dict(_offloaded_weights(model))
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, torch.Tensor):
            digest.update(f"{name} {tuple(weight.shape)} ".encode())
            digest.update(_sample(offloaded.get(name, weight), rounded_to))
        else:
            # Some layers keep settings of their own beside their weights.
            digest.update(f"{name} {type(weight).__name__} ".encode())
    for name, module in model.named_modules():
        if is_adapted(module):
            state = [name, module.disable_adapters, module.active_adapters, module.merged_adapters]
            digest.update(json.dumps(state, default=str).encode())
    if tokenizer is not None:
        words = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
        digest.update(json.dumps(words).encode())
    return digest.hexdigest()


def fingerprint_file(path: str | os.PathLike[str]) -> str:
    """Hash the whole file `path`, which holds the weights of a small model."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def _sample(weight: torch.Tensor, rounded_to: torch.dtype) -> bytes:
    """Some numbers of `weight`, spread over it; nothing where they are not to be had."""
    weight = weight.detach()
    if weight.device.type == "meta":
        return b""
    if hasattr(weight, "__tensor_flatten__"):
        # A quantised weight is made of others: packed numbers, scales, zero points.
        names, _ = weight.__tensor_flatten__()
        return b"".join(_sample(getattr(weight, name), rounded_to) for name in names)
    stride = max(1, weight.numel() // _NUM_SAMPLES)
    try:
        sample = weight.reshape(-1)[::stride]
        return sample.to(rounded_to).to(torch.float32).cpu().contiguous().numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError):
        # A tensor of a kind of its own, which may have no strides and no such cast.
        return type(weight).__name__.encode()


def _offloaded_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that accelerate keeps elsewhere between passes, by their names in the model."""
    for prefix, module in model.named_modules():
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if kept is None:
            continue
        for name, weight in module.named_parameters(prefix=prefix, recurse=False):
            with contextlib.suppress(KeyError):
                if weight.device.type == "meta":
                    yield name, kept[name.removeprefix(f"{prefix}.")]
