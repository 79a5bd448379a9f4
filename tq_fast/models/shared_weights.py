"""The models of several roles together: what they have in common is loaded once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ..errors import InvalidArgument
from ..forest.view import Adapters, view_of
from ..rewards.function import names_a_function
from ..servers import Server
from .adapters import (
    AdapterFolder,
    Unwrapped,
    attach_adapter,
    head_size,
    read_adapter_folder,
    unwrap,
    why_not_off,
)
from .checkpoints import (
    existing,
    holds_weights_of,
    load_checkpoint,
    refuse_unfilled,
    share_weights,
)

_LANGUAGE = ("baseline", "sft")
_REWARDS = ("reward", "baseline_reward")


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

    def shares_model(self, other: _Named) -> bool:
        """Whether one model serves both, with different adapters perhaps."""
        is_same = self.auto_class is other.auto_class and self.options == other.options
        return is_same and self.shares_weights(other)

    def shares_weights(self, other: _Named) -> bool:
        """Whether both have the same weights but for their adapters and their heads."""
        if self.base != other.base or self.device != other.device:
            return False
        adapters = [one.adapter for one in (self, other) if one.adapter is not None]
        if self.adapter != other.adapter and any(adapter.changes_base for adapter in adapters):
            return False
        ours, theirs = ({**one.options, "num_labels": None} for one in (self, other))
        return ours == theirs


class Loader:
    """Loads the models of a session by role.

    Models that are named alike, with the same `model_kwargs` and device, are one object. So are
    an adapter's base and the base by itself: every role has a view of the same modules, in which
    its own adapter is on or off. A classifier and a language model with one base have its
    weights in common. A model object that is given both by itself and inside of a PeftModel is,
    by itself, the base with adapters off, and so is the name that the base was loaded from; any
    other object runs with its adapters as they are when it is used.

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
        self._bases: list[tuple[_Named, PreTrainedModel]] = []
        self._views: list[tuple[PreTrainedModel, Adapters, PreTrainedModel]] = []
        for role, source in sources.items():
            if Server.named(source) is not None:
                continue
            if isinstance(source, torch.nn.Module):
                self._objects[role] = unwrap(source, role)
            elif not isinstance(source, (str, os.PathLike)):
                continue
            elif role in _LANGUAGE:
                self._named[role] = self._read_name(AutoModelForCausalLM, source, role)
            elif role in _REWARDS and not names_a_function(os.fspath(source)):
                auto_class = AutoModelForSequenceClassification
                self._named[role] = self._read_name(auto_class, source, role)

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
        obstacle = why_not_off(model)
        if obstacle is not None:
            raise InvalidArgument(f"{role} is the base of a PeftModel {obstacle}")
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
            base = self._base_given(self._named[role])
            if base is not None:
                self._loaded[role] = self._view(base, False)
            else:
                self._load(self._named[role])
        return self._loaded[role]

    def _base_given(self, wanted: _Named) -> PreTrainedModel | None:
        """The model inside of a PeftModel that was given and that has `wanted` for its base."""
        if wanted.adapter is not None or wanted.options:
            return None
        for given in self._objects.values():
            model = given.model
            if not given.is_peft or not isinstance(model, PreTrainedModel):
                continue
            known = wanted.auto_class._model_mapping.get(type(model.config), None)
            is_there = known is type(model) and model.device == wanted.device
            is_base = is_there and why_not_off(model) is None
            if is_base and holds_weights_of(wanted.base, model, self._dtype):
                return model
        return None

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
        sharing = [n for n in self._named.values() if n.shares_model(wanted)]
        model, unfilled = load_checkpoint(
            wanted.auto_class,
            wanted.base,
            wanted.role,
            device=wanted.device,
            dtype=self._dtype,
            options=wanted.options,
        )
        for one, base in self._bases:
            if one.shares_weights(wanted):
                share_weights(model, base)
                break
        self._bases.append((wanted, model))
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
            lacking = unfilled
            if one.adapter is not None:
                lacking = unfilled.without(functools.partial(_is_replaced, model))
            refuse_unfilled(model, one.base, one.role, lacking)
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
    module = model
    for part in name.split(".")[:-1]:
        if "modules_to_save" in module._modules:
            return True
        inner = module._modules.get(part)
        if inner is None:
            return False
        module = inner
    return "modules_to_save" in module._modules
