"""Views of a model: the same weights under module objects of one's own.

A forest needs another attention in the model, and on a CPU other forwards in its layers. Putting
them into the user's model, even for a moment, would show in every model that shares its
configuration and in every thread that runs it meanwhile. `view_of` copies the module objects
instead and shares everything that is large: the dicts of parameters and buffers are the original's
own, so that weights which are replaced there are replaced here.
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

# Dicts that a view has in common with its original.
_SHARED = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})


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
            if name not in _SHARED:
                own[name] = self._value(value)
        own["_modules"] = dict(own["_modules"])
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
        if type(value) in (list, tuple):
            parts = [self._value(part) for part in value]
            is_same = all(new is old for new, old in zip(parts, value, strict=True))
            return value if is_same else type(value)(parts)
        if type(value) in (dict, OrderedDict):
            entries = {key: self._value(part) for key, part in value.items()}
            is_same = all(entries[key] is part for key, part in value.items())
            return value if is_same else type(value)(entries)
        return value

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
