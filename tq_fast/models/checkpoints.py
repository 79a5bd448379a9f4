"""One model from a folder or the hub: weights that are missing are an error that names them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from ..errors import InvalidArgument, UnsupportedModel, warn_caller
from ..forest.huge_pages import copy_from_files
from .adapters import FINDING, short

# Keyword arguments that change how names are turned into configurations.
_OF_CONFIG = (*FINDING, "trust_remote_code", "code_revision", "gguf_file")
# Keyword arguments that change how names are turned into tokenizers.
_OF_TOKENIZER = _OF_CONFIG
_RESERVED = ("output_loading_info", "config", "state_dict", "ignore_mismatched_sizes")
# Names of weights in a message, at most.
_NUM_NAMED = 3
# With one of these, whoever loads the model says where its parts are put.
_PLACED = ("device_map", "quantization_config", "max_memory", "load_in_8bit", "load_in_4bit")


@dataclasses.dataclass(frozen=True)
class Unfilled:
    """The differences between a model and its checkpoint; what the checkpoint lacks is random.

    Attributes:
        missing: weights of the model that the checkpoint lacks.
        resized: weights that have another shape in the checkpoint, each with both shapes.
        unused: weights of the checkpoint that the model lacks.
    """

    missing: Sequence[str]
    resized: Mapping[str, str]
    unused: Sequence[str]

    def without(self, is_replaced: Callable[[str], bool]) -> Unfilled:
        """Return the differences but for the weights that something else brings."""
        missing = [name for name in self.missing if not is_replaced(name)]
        resized = {name: text for name, text in self.resized.items() if not is_replaced(name)}
        return Unfilled(missing, resized, self.unused)


def load_checkpoint(
    auto_class: Any,
    name: str,
    role: str,
    *,
    device: torch.device,
    dtype: Any,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, Unfilled]:
    """Return the model, in evaluation mode, and how it differs from its checkpoint.

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
    # Weights of another shape are refused here, by name; transformers only logs their names.
    given = {"use_safetensors": True, **options, "ignore_mismatched_sizes": True}
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
    resized = {
        key: f"{key} is {list(there)} there and {list(here)} in the model"
        for key, there, here in sorted(info.get("mismatched_keys") or ())
    }
    missing = sorted(set(info.get("missing_keys") or ()) - set(resized))
    unfilled = Unfilled(missing, resized, sorted(info.get("unexpected_keys") or ()))
    if unfilled.unused and not missing:
        warn_caller(
            f"{role}={name!r} holds {len(unfilled.unused)} weights that {type(model).__name__} "
            f"does not use: {named(unfilled.unused)}"
        )
    places_itself = any(options.get(key) is not None for key in _PLACED)
    if not places_itself and getattr(model, "hf_quantizer", None) is None:
        model.to(device)
        copy_from_files(model)
    return model.eval(), unfilled


def refuse_unfilled(model: PreTrainedModel, name: str, role: str, unfilled: Unfilled) -> None:
    """Refuse a model whose checkpoint lacks weights, or has them in another shape.

    Raises:
        InvalidArgument: the message names the first of them, and says whether it is the head.
    """
    missing = unfilled.missing
    if missing:
        prefix = f"{model.base_model_prefix}."
        what = f"{len(missing)} weights are missing from the checkpoint: {named(missing)}"
        if not any(part.startswith(prefix) for part in missing):
            what = (
                f"the head of {type(model).__name__} was never trained: it lacks {named(missing)}"
            )
        instead = f" (it holds {named(unfilled.unused)} instead)" if unfilled.unused else ""
        raise InvalidArgument(f"{role}={name!r}: {what}{instead}")
    if unfilled.resized:
        raise InvalidArgument(
            f"{role}={name!r}: weights of the checkpoint have another shape: "
            f"{named(list(unfilled.resized.values()))}"
        )


def named(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def holds_weights_of(name: str, model: PreTrainedModel, dtype: torch.dtype | str) -> bool:
    """Whether the checkpoint `name` is where `model` was loaded from, and is unchanged since.

    The first row of every weight of the checkpoint is compared, adapters in `model` left aside.

    Args:
        name: a folder or a hub id, of which only what is on this machine is read.
        model: a model that is loaded already.
        dtype: dtype in which the checkpoint would be loaded.
    """
    if name not in (model.name_or_path, os.path.realpath(model.name_or_path)):
        return False
    try:
        config = cached_file(name, "config.json", local_files_only=True)
        files = sorted(Path(config).parent.glob("*.safetensors")) if config else []
        weights = base_weights(model)
        return bool(files) and all(_is_filled_from(path, weights, dtype) for path in files)
    except (OSError, ValueError, SafetensorError):
        return False


def _is_filled_from(
    path: Path, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | str
) -> bool:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight, stored = weights.get(name), file.get_slice(name)
            if weight is None or type(weight.data) is not torch.Tensor or not weight.dim():
                return False
            if list(weight.shape) != stored.get_shape():
                return False
            row = stored[:1]
            if isinstance(dtype, torch.dtype):
                row = row.to(dtype)
            if row.dtype != weight.dtype or not torch.equal(row, weight[:1].cpu()):
                return False
    return True


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by the names that they have where no adapter is injected."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight
        for name, weight in model.state_dict(keep_vars=True).items()
        if isinstance(weight, torch.Tensor)
    }


def share_weights(model: torch.nn.Module, source: torch.nn.Module) -> None:
    """Let `model` hold the tensors of `source` in place of its own that have the same name.

    Both were loaded from one checkpoint in the same way, `source` perhaps with adapters since.
    """
    held = base_weights(source)
    for name, own in model.state_dict(keep_vars=True).items():
        weight = held.get(name)
        if weight is None or own.device.type == "meta":
            continue
        if type(own) is type(weight) and own.shape == weight.shape and own.dtype == weight.dtype:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            slots: Any = module._parameters if leaf in module._parameters else module._buffers
            slots[leaf] = weight


def tokenizer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments of a model that its tokenizer needs too."""
    return _among(options, _OF_TOKENIZER)


def existing(source: str | os.PathLike[str], role: str) -> str:
    """Return `source` if it is a folder that exists or may be a hub id.

    Raises:
        InvalidArgument: there is no such folder.
    """
    name = os.fspath(source)
    if name and Path(name).is_dir():
        return name
    is_path = isinstance(source, os.PathLike) or name.startswith((".", "/", "~"))
    # "models/nope" beside a folder "models" is a slip of the pen, not an organisation's model.
    is_path = is_path or ("/" in name and Path(name).parent.is_dir())
    if not name or is_path or name.count("/") > 1:
        raise InvalidArgument(f"{role}={name!r}: there is no such folder")
    return name


def _among(options: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: options[key] for key in keys if key in options}
