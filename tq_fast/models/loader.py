"""The models of several roles together: what they have in common is loaded once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ..errors import InvalidArgument
from ..forest.view import Adapters, view_of
from .adapters import (
    AdapterFolder,
    Unwrapped,
    attach_adapter,
    has_merged,
    head_size,
    read_adapter_folder,
    unwrap,
)
from .checkpoints import existing, load_checkpoint, refuse_missing

_LANGUAGE = ("baseline", "sft")


@dataclasses.dataclass(frozen=True)
class _Named:
    """A model that a role names.

    Attributes:
        role: the role.
        auto_class: the class of transformers that finds the architecture.
        base: the folder or hub id of the weights.
        device: where they are put.
        options: keyword arguments of from_pretrained for them.
        adapter: the adapter on top, or None.
    """

    role: str
    auto_class: Any
    base: str
    device: torch.device
    options: Mapping[str, Any]
    adapter: AdapterFolder | None

    def shares_with(self, other: _Named) -> bool:
        """Whether one set of weights serves both."""
        is_same = self.auto_class is other.auto_class and self.base == other.base
        return is_same and self.device == other.device and self.options == other.options


class Loader:
    """Loads the models of a session by role.

    Models that are named alike, with the same `model_kwargs` and device, are one object. So are
    an adapter's base and the base by itself: every role has a view of the same modules, in which
    its own adapter is on or off. A model object that is given both by itself and inside of a
    PeftModel is, by itself, the base with adapters off; any other object runs with its adapters as
    they are when it is used.

    Args:
        sources: what was given, by role.
        devices: where models are put that are given by name, by role.
        dtype: of models given by name.
        model_kwargs: more keyword arguments of from_pretrained, by role.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        *,
        devices: Mapping[str, torch.device],
        dtype: torch.dtype | str,
        model_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._devices = devices
        self._dtype = dtype
        self._options = model_kwargs or {}
        self._objects: dict[str, Unwrapped] = {}
        self._named: dict[str, _Named] = {}
        self._loaded: dict[str, PreTrainedModel] = {}
        self._views: list[tuple[PreTrainedModel, Adapters, PreTrainedModel]] = []
        for role, source in sources.items():
            if isinstance(source, torch.nn.Module):
                self._objects[role] = unwrap(source, role)
            elif role in _LANGUAGE and isinstance(source, (str, os.PathLike)):
                self._named[role] = self._read_name(AutoModelForCausalLM, source, role)

    def language_model(self, source: Any, role: str) -> PreTrainedModel:
        """Return the causal language model of `role`.

        Raises:
            InvalidArgument: there is none, or it lacks weights.
        """
        return self._model(AutoModelForCausalLM, source, role)

    def classifier(self, source: Any, role: str) -> PreTrainedModel:
        """Return the sequence classifier of `role`.

        Raises:
            InvalidArgument: there is none, or it lacks weights.
        """
        return self._model(AutoModelForSequenceClassification, source, role)

    def options_of(self, role: str) -> Mapping[str, Any]:
        """Return the keyword arguments of from_pretrained for `role`."""
        return self._options.get(role, {})

    def object_of(self, source: Any, role: str) -> Any:
        """Return `source`, a module as it runs: out of its wrappers, its adapters on or off."""
        if not isinstance(source, torch.nn.Module):
            return source
        given = self._objects.get(role) or unwrap(source, role)
        model = given.model
        through_peft = any(
            other.is_peft and other.model is model for other in self._objects.values()
        )
        if given.is_peft or not through_peft:
            return model
        if has_merged(model):
            raise InvalidArgument(
                f"{role} is the base of a PeftModel whose adapter is merged into its weights; "
                "unmerge it, so that it can be switched off"
            )
        return self._view(model, False)

    def _model(self, auto_class: Any, source: Any, role: str) -> PreTrainedModel:
        if not isinstance(source, (str, os.PathLike)):
            model = self.object_of(source, role)
            if not isinstance(model, PreTrainedModel):
                raise InvalidArgument(
                    f"{role} must be a hub id, a folder or a model of transformers, got "
                    f"{type(source).__name__}"
                )
            return model
        if role not in self._named:
            self._named[role] = self._read_name(auto_class, source, role)
        if role not in self._loaded:
            self._load(self._named[role])
        return self._loaded[role]

    def _read_name(self, auto_class: Any, source: Any, role: str) -> _Named:
        name, options = existing(source, role), dict(self._options.get(role, {}))
        adapter = read_adapter_folder(name, role, options)
        if adapter is not None:
            name = existing(adapter.base, f"{role}={name!r}: base_model_name_or_path")
            options = {key: v for key, v in options.items() if key not in adapter.finding}
            if adapter.base_revision is not None:
                options["revision"] = adapter.base_revision
            labels = head_size(adapter)
            if auto_class is AutoModelForSequenceClassification and labels is not None:
                options.setdefault("num_labels", labels)
        if Path(name).is_dir():
            name = os.path.realpath(name)
        return _Named(role, auto_class, name, self._devices[role], options, adapter)

    def _load(self, wanted: _Named) -> None:
        """Load the weights of `wanted` for every role that shares them."""
        sharing = [n for n in self._named.values() if n.shares_with(wanted)]
        model, missing = load_checkpoint(
            wanted.auto_class,
            wanted.base,
            wanted.role,
            device=wanted.device,
            dtype=self._dtype,
            options=wanted.options,
        )
        names: dict[str, Adapters] = {}
        around, alone = None, []
        for one in sharing:
            if one.adapter is None or one.adapter.name in names:
                continue
            try:
                around = attach_adapter(
                    model, one.adapter, one.role, adapter_name=f"of_{one.role}", around=around
                )
            except InvalidArgument:
                if around is None:
                    raise
                # Two kinds of adapter do not go into one model.
                alone.append(one)
                continue
            names[one.adapter.name] = f"of_{one.role}"
        for one in sharing:
            if one in alone or one.role in self._loaded:
                continue
            adapters = False if one.adapter is None else names[one.adapter.name]
            unfilled = missing
            if one.adapter is not None:
                unfilled = [name for name in missing if not _is_replaced(model, name)]
            refuse_missing(model, one.base, one.role, unfilled)
            is_plain = not names or (len(names) == 1 and adapters is not False)
            self._loaded[one.role] = model if is_plain else self._view(model, adapters)
        for one in alone:
            other = Loader({}, devices=self._devices, dtype=self._dtype, model_kwargs=self._options)
            source = one.adapter.name if one.adapter else one.base
            self._loaded[one.role] = other._model(one.auto_class, source, one.role)

    def _view(self, model: PreTrainedModel, adapters: Adapters) -> PreTrainedModel:
        """The view of `model` with `adapters`, the same one for every role that asks for it."""
        for seen, wanted, view in self._views:
            if seen is model and wanted == adapters:
                return view
        view = view_of(model, adapters=adapters)
        self._views.append((model, adapters, view))
        return view


def _is_replaced(model: torch.nn.Module, name: str) -> bool:
    """Whether an adapter brings the module of the weight `name`, which the base lacks."""
    if name.startswith("("):
        return True
    module = model
    for part in name.split(".")[:-1]:
        if "modules_to_save" in module._modules:
            return True
        inner = module._modules.get(part)
        if inner is None:
            return False
        module = inner
    return "modules_to_save" in module._modules
