"""Adapters of peft: the modules inside of a PeftModel, and folders that hold an adapter alone."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from ..errors import InvalidArgument, UnsupportedModel
from ..forest.view import is_adapted

# Keyword arguments of from_pretrained that say where the files are, the adapter's own included.
FINDING = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """A model as it runs, without what was put around it.

    Attributes:
        model: the module inside; what was given, where nothing is around it.
        is_peft: whether it came inside of a PeftModel.
    """

    model: Any
    is_peft: bool = False


def unwrap(source: Any, role: str) -> Unwrapped:
    """Take `source` out of torch.compile, data parallelism and peft.

    The layers of an adapter are inside of the model itself: what is taken off is the PeftModel
    around it.

    Raises:
        UnsupportedModel: an adapter that is more than layers, such as a learnt prompt.
    """
    is_peft = False
    # The model inside of a PeftModel has the attribute peft_config too.
    while isinstance(source, torch.nn.Module) and not isinstance(source, PreTrainedModel):
        inner = source._modules.get("_orig_mod")
        if isinstance(source, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = source.module
        elif inner is None and hasattr(source, "peft_config") and hasattr(source, "base_model"):
            inner, is_peft = _inside_of_peft(source, role), True
        if inner is None:
            break
        source = inner
    return Unwrapped(source, is_peft)


def _inside_of_peft(source: Any, role: str) -> Any:
    for config in source.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModel(
                f"{role}: a {type(source).__name__} with a learnt prompt "
                f"({type(config).__name__}) is not honoured; adapters inside of layers are"
            )
    return source.base_model.model


def why_not_off(model: torch.nn.Module) -> str | None:
    """Return why `model` is not its base again when its adapters are off; None where it is."""
    if any(
        is_adapted(module) and bool(getattr(module, "merged_adapters", ()))
        for module in model.modules()
    ):
        return "whose adapter is merged into its weights; unmerge it"
    configs = getattr(model, "peft_config", None) or {}
    if any(_changes_base(vars(config)) for config in configs.values()):
        return "whose adapter changes weights of the base; give the base as a model of its own"
    return None


def _changes_base(config: Mapping[str, Any], stored: Iterable[str] = ()) -> bool:
    """Whether an adapter changes weights of its base in place.

    Args:
        config: its configuration.
        stored: names of the weights in its file.
    """
    wrapped = set(config.get("modules_to_save") or ())
    for name in stored:
        *path, module, _ = ["", "", *name.split(".")]
        is_embedding = module in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
        # The adapter has a copy of wrapped modules; it overwrites other embeddings.
        if module == "base_layer" or (is_embedding and not wrapped & {module, *path}):
            return True
    start = config.get("init_lora_weights")
    # Other starts, such as PiSSA's, take out of the base what they put into the adapter.
    starts_apart = not isinstance(start, str) or start in ("gaussian", "eva", "orthogonal")
    return config.get("bias", "none") not in ("none", None) or not starts_apart


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """An adapter that is not loaded yet.

    Attributes:
        name: the folder or hub id.
        base: the folder or hub id of the model that it adapts.
        base_revision: revision of the base, or None.
        finding: keyword arguments that say where the adapter's files are.
        changes_base: whether it overwrites weights of the base, which no other role can share then.
    """

    name: str
    base: str
    base_revision: str | None
    finding: Mapping[str, Any]
    changes_base: bool


def read_adapter_folder(name: str, role: str, options: Mapping[str, Any]) -> AdapterFolder | None:
    """Return the adapter that `name` is; None where it is a model.

    Args:
        name: a folder or a hub id.
        role: the argument's name, for messages.
        options: keyword arguments of from_pretrained.

    Raises:
        InvalidArgument: the adapter's configuration cannot be read, or names no base.
        UnsupportedModel: the adapter is a learnt prompt.
    """
    finding = {key: options[key] for key in FINDING if key in options}
    try:
        path = find_adapter_config_file(name, **finding)
        if path is None:
            return None
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        stored = _stored_shapes(name, finding)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(name).is_dir():
            raise InvalidArgument(
                f"{role}={name!r}: the adapter cannot be read: {short(error)}"
            ) from error
        return None
    base = config.get("base_model_name_or_path")
    if not base:
        raise InvalidArgument(
            f"{role}={name!r} holds an adapter whose adapter_config.json names no base model"
        )
    kind = str(config.get("peft_type", ""))
    if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"):
        raise UnsupportedModel(f"{role}={name!r} is a learnt prompt ({kind}), not honoured")
    if not Path(base).is_dir() and (Path(path).parent / base).is_dir():
        # A base that lies beside its adapter is often named from there.
        base = os.fspath(Path(path).parent / base)
    changes_base = _changes_base(config, stored)
    return AdapterFolder(name, base, config.get("revision"), finding, changes_base)


def attach_adapter(
    model: Any, folder: AdapterFolder, role: str, *, adapter_name: str, around: Any
) -> Any:
    """Put the layers of an adapter into `model`; return the PeftModel around it.

    Args:
        model: the base.
        folder: the adapter.
        role: the argument's name, for messages.
        adapter_name: what the adapter is called inside of the model.
        around: the PeftModel that is around `model` already, or None.

    Raises:
        InvalidArgument: peft is not installed, or cannot load it, or weights are missing.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InvalidArgument(
            f"{role}={folder.name!r} is an adapter, which needs peft (pip install peft)"
        ) from error
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if around is None:
                around = PeftModel.from_pretrained(
                    model, folder.name, adapter_name=adapter_name, **folder.finding
                )
            else:
                around.load_adapter(folder.name, adapter_name=adapter_name, **folder.finding)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever peft makes of an adapter of another model.
        raise InvalidArgument(
            f"{role}={folder.name!r}: the adapter does not fit {folder.base!r}: {short(error)}"
        ) from error
    for warning in said:
        if "missing adapter keys" in str(warning.message).lower():
            raise InvalidArgument(
                f"{role}={folder.name!r}: weights of the adapter are missing: "
                f"{short(warning.message)}"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    around.eval()
    return around


def head_size(folder: AdapterFolder) -> int | None:
    """Return how many labels the head in a classifier's adapter has; None where it has none."""
    for name, shape in _stored_shapes(folder.name, folder.finding).items():
        parts = name.split(".")
        is_head = parts[-1] == "weight" and {"score", "classifier"} & set(parts)
        if is_head and not {"lora_A", "lora_B"} & set(parts):
            return shape[0]
    return None


def _stored_shapes(name: str, finding: Mapping[str, Any]) -> dict[str, list[int]]:
    """The names and shapes of an adapter's weights; empty where its file is of another kind."""
    path = cached_file(
        name,
        "adapter_model.safetensors",
        _raise_exceptions_for_missing_entries=False,
        **finding,
    )
    if path is None:
        return {}
    with safe_open(path, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def short(words: object, most: int = 160) -> str:
    """Return `words` on one line, cut where they are long."""
    line = " ".join(str(words).split())
    return line if len(line) <= most else line[: most - 3] + "..."
