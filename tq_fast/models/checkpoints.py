"""One model from a folder or the hub: weights that are missing are an error that names them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..errors import InvalidArgument, UnsupportedModel, warn_caller
from .adapters import FINDING, short

# Keyword arguments that change how names are turned into configurations.
_OF_CONFIG = (*FINDING, "trust_remote_code", "code_revision", "gguf_file")
# Keyword arguments that change how names are turned into tokenizers.
_OF_TOKENIZER = _OF_CONFIG
_RESERVED = ("output_loading_info", "config", "state_dict")
# Names of weights in a message, at most.
_NUM_NAMED = 3
# With one of these, whoever loads the model says where its parts are put.
_PLACED = ("device_map", "quantization_config", "max_memory", "load_in_8bit", "load_in_4bit")


def load_checkpoint(
    auto_class: Any,
    name: str,
    role: str,
    *,
    device: torch.device,
    dtype: Any,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, in evaluation mode, and the names of the weights that are missing.

    Args:
        auto_class: the class of transformers that finds the architecture.
        name: a folder that exists, or a hub id.
        role: the argument's name, for messages.
        device: where the model is put, unless `options` or its quantisation say it.
        dtype: as `from_pretrained` takes it.
        options: more keyword arguments of `from_pretrained`.

    Raises:
        InvalidArgument: nothing can be loaded there.
        UnsupportedModel: the architecture is no causal language model.
    """
    reserved = [key for key in _RESERVED if key in options]
    if reserved:
        raise InvalidArgument(f"model_kwargs of {role} cannot have {reserved[0]!r}")
    given = {"use_safetensors": True, **options}
    if "torch_dtype" not in given:
        given.setdefault("dtype", dtype)
    try:
        config = AutoConfig.from_pretrained(name, **_among(options, _OF_CONFIG))
        is_foreign = bool(options.get("trust_remote_code"))
        is_known = type(config) in auto_class._model_mapping or is_foreign
        if auto_class is AutoModelForCausalLM and not is_known:
            raise UnsupportedModel(
                f"{role}: model type {config.model_type!r} is no causal language model"
            )
        model, info = auto_class.from_pretrained(name, **given, output_loading_info=True)
    except (torch.OutOfMemoryError, UnsupportedModel):
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
        TypeError,
        KeyError,
        SafetensorError,
    ) as error:
        beside = f" with model_kwargs {sorted(options)}" if options else ""
        raise InvalidArgument(
            f"{role}={name!r}{beside} cannot be loaded: {short(error)}"
        ) from error
    unexpected = sorted(info.get("unexpected_keys") or ())
    missing = sorted(info.get("missing_keys") or ())
    if unexpected and not missing:
        warn_caller(
            f"{role}={name!r} holds {len(unexpected)} weights that {type(model).__name__} does "
            f"not use: {named(unexpected)}"
        )
    elif unexpected:
        missing.append(f"(it holds {named(unexpected)} instead)")
    places_itself = any(options.get(key) is not None for key in _PLACED)
    if not places_itself and getattr(model, "hf_quantizer", None) is None:
        model.to(device)
    return model.eval(), missing


def refuse_missing(model: PreTrainedModel, name: str, role: str, missing: Sequence[str]) -> None:
    """Refuse a model whose checkpoint lacks weights, which were drawn at random then.

    Raises:
        InvalidArgument: the message names the first of them, and says whether it is the head.
    """
    if not missing:
        return
    beside = next((f" {part}" for part in missing if part.startswith("(")), "")
    weights = [part for part in missing if not part.startswith("(")]
    prefix = f"{model.base_model_prefix}."
    head = [part for part in weights if not part.startswith(prefix)]
    what = f"{len(weights)} weights are missing from the checkpoint: {named(weights)}"
    if len(head) == len(weights):
        what = f"the head of {type(model).__name__} was never trained: it lacks {named(head)}"
    raise InvalidArgument(f"{role}={name!r}: {what}{beside}")


def named(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def tokenizer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments of a model that its tokenizer needs too."""
    return _among(options, _OF_TOKENIZER)


def existing(source: str | os.PathLike[str], role: str) -> str:
    """Return `source` if it is a folder that exists or may be a hub id.

    Raises:
        InvalidArgument: there is no such folder.
    """
    name = os.fspath(source)
    if Path(name).is_dir():
        return name
    is_path = isinstance(source, os.PathLike) or name.startswith((".", "/", "~"))
    # "models/nope" beside a folder "models" is a slip of the pen, not an organisation's model.
    is_path = is_path or ("/" in name and Path(name).parent.is_dir())
    if not name or is_path or name.count("/") > 1:
        raise InvalidArgument(f"{role}={name!r}: there is no such folder")
    return name


def _among(options: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: options[key] for key in keys if key in options}
