"""What `mkdocs.yml` adds to the reading of the sources, from which the reference is made."""

from __future__ import annotations

from typing import Any

import griffe


class FunctionsBeforeModules(griffe.Extension):
    """Let a function of a package go before its module of the same name.

    `tq_fast.presets.blocks` is a function once the package is imported; read as files it would be
    the module beside it.
    """

    def __init__(self) -> None:
        self._functions: dict[str, griffe.Function] = {}

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Remember every function of a package's own `__init__.py`."""
        if func.parent is not None and func.parent.is_module and func.parent.is_init_module:
            self._functions[func.path] = func

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Put the functions back in whose place modules were read."""
        for path, function in self._functions.items():
            package, _, name = path.rpartition(".")
            if package.startswith(f"{pkg.name}."):
                parent = pkg[package.removeprefix(f"{pkg.name}.")]
                if parent.members[name] is not function:
                    parent.set_member(name, function)
