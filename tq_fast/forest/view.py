"""Views of a model: the same weights under module objects of one's own.

A forest needs another attention in the model, and on a CPU other forwards in its layers. Putting
them into the user's model, even for a moment, would show in every model that shares its
configuration and in every thread that runs it meanwhile. `view_of` copies the module objects
instead and shares everything that is large. The dicts of parameters are the original's own, so that
weights which are replaced there are replaced here, unless accelerate's hooks replace them for the
length of a forward pass; the dicts of buffers are copied, because some rotary embeddings replace
theirs in a forward pass.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Which adapters of peft run: none (False), the one of this name, or as the model says (None).
Adapters: TypeAlias = Literal[False] | str | None

_Module = TypeVar("_Module", bound=nn.Module)

# Attributes that are copied, or not, whatever they hold.
_PLAIN = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})


def view_of(model: _Module, *, attention: str | None = None, adapters: Adapters = None) -> _Module:
    """Return a view of `model` in evaluation mode.

    Everything in a module's attributes that is bound to a module of the tree (methods, partial
    functions such as the hooks of accelerate, modules in lists and dicts) is bound to its view.

    Args:
        model: any module.
        attention: name of the attention that the view's configurations ask for; None: that of
            `model`.
        adapters: the adapters of peft that run in the view: False for none, or the name of one;
            None: those that run in `model`.
    """
    return _Viewer(attention, adapters).module(model)


def seen_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of `model` that stand for those of its view, in the same order."""
    return (module for module in model.modules() if "_orig_mod" not in module._modules)


def is_adapted(module: nn.Module) -> bool:
    """Whether `module` is a layer that peft put around one of the model's own."""
    # Looked up without the module's own __getattr__, which peft's wrappers pass on to the layer.
    return "_disable_adapters" in module.__dict__ or hasattr(type(module), "_disable_adapters")


class _Viewer:
    """Copies one tree of modules; what stands in several places is copied once."""

    def __init__(self, attention: str | None, adapters: Adapters) -> None:
        self._attention = attention
        self._adapters = adapters
        self._views: dict[int, Any] = {}
        # Containers that are being looked through, since some hold themselves.
        self._open: set[int] = set()

    def module(self, original: _Module) -> _Module:
        if id(original) in self._views:
            return self._views[id(original)]
        compiled = original.__dict__["_modules"].get("_orig_mod")
        if compiled is not None:
            # Compiled code is bound to the original's own modules.
            self._views[id(original)] = self.module(compiled)
            return self._views[id(original)]
        view = original.__class__.__new__(original.__class__)
        # Known before its parts are copied, since some of them refer to it.
        self._views[id(original)] = view
        own = view.__dict__
        own.update(original.__dict__)
        for name, value in original.__dict__.items():
            if name == "_hf_hook":
                own[name] = self._hook(value)
            elif name not in _PLAIN:
                own[name] = self._value(value)
        own["_modules"], own["_buffers"] = dict(own["_modules"]), dict(own["_buffers"])
        own["_non_persistent_buffers_set"] = set(own["_non_persistent_buffers_set"])
        if "_hf_hook" in own:
            own["_parameters"] = dict(own["_parameters"])
        own["training"] = False
        # This is what Module.compile() leaves.
        if "_compiled_call_impl" in own:
            own["_compiled_call_impl"] = None
        if self._adapters is not None and is_adapted(original):
            own["_disable_adapters"] = self._adapters is False
            if self._adapters is not False:
                own["_active_adapter"] = [self._adapters]
        return view

    def _value(self, value: Any) -> Any:
        """`value`, or what stands for it in the view."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) is functools.partial:
            return self._partial(value)
        if isinstance(value, types.FunctionType) and "_torchdynamo_orig_callable" in vars(value):
            return self._value(vars(value)["_torchdynamo_orig_callable"])
        if id(value) in self._open:
            return value
        if type(value) in (list, tuple, dict, OrderedDict):
            self._open.add(id(value))
            try:
                return self._container(value)
            finally:
                self._open.remove(id(value))
        return value

    def _container(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            parts = [self._value(part) for part in value]
            is_same = all(new is old for new, old in zip(parts, value, strict=True))
            return value if is_same else type(value)(parts)
        entries = {key: self._value(part) for key, part in value.items()}
        is_same = all(entries[key] is part for key, part in value.items())
        return value if is_same else type(value)(entries)

    def _hook(self, hook: Any) -> Any:
        """A hook of accelerate's of the view's own: it keeps what belongs to one forward pass."""
        if id(hook) not in self._views:
            made = self._views[id(hook)] = copy.copy(hook)
            for name, value in vars(made).items():
                if name == "hooks":
                    vars(made)[name] = tuple(map(self._hook, value))
                elif name == "tied_params_map" and value is not None:
                    vars(made)[name] = self._own_map(value)
        return self._views[id(hook)]

    def _own_map(self, tied: dict[Any, dict[Any, Any]]) -> dict[Any, dict[Any, Any]]:
        """The tied weights that accelerate holds on a device, one copy for all hooks."""
        if id(tied) not in self._views:
            self._views[id(tied)] = {key: dict(held) for key, held in tied.items()}
        return self._views[id(tied)]

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        args, keywords = self._value(value.args), self._value(value.keywords)
        if args is value.args and keywords is value.keywords:
            return value
        return functools.partial(value.func, *args, **keywords)

    def _config(self, original: PreTrainedConfig) -> PreTrainedConfig:
        """A configuration of the view's own, where it asks for another attention."""
        if self._attention is None:
            return original
        if id(original) not in self._views:
            config = self._views[id(original)] = copy.copy(original)
            for name in getattr(original, "sub_configs", {}):
                part = getattr(original, name, None)
                if isinstance(part, PreTrainedConfig):
                    setattr(config, name, self._config(part))
            config._attn_implementation_internal = self._attention
        return self._views[id(original)]


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which the model's forward takes its cache."""
    return "cache" if takes(model, "cache") else "past_key_values"


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` has a parameter of this name."""
    kind: Any = type(module)
    return name in _parameters_of(kind)


@functools.cache
def _parameters_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
