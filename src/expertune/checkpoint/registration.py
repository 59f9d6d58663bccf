"""Make transformers know NF4 folders once `expertune` is imported, before or after transformers itself.

transformers has no way to find a quantizer by itself, and importing it here would cost every command its start. So
where it has not been imported yet, a finder waits for the one module that keeps the list of quantizers, and adds to it
when that module has been executed. `when_imported` does the same for any other library that is to be told something.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_transformers() -> None:
    """Register the quantizer now if transformers keeps a list already, otherwise as soon as it does."""
    when_imported("transformers.quantizers.auto", "register_quantizer", _register)


def when_imported(module: str, attribute: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with a module: now if it has been imported, otherwise as soon as it is; once per process.

    Args:
        module: dotted name of the module, which is not imported by this.
        attribute: a name that the module has when it has been executed.
        act: what to do with it.
    """
    imported = sys.modules.get(module)
    if imported is not None and hasattr(imported, attribute):
        act(imported)
    elif not any(isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, act))


def _register(_module: ModuleType) -> None:
    from expertune.checkpoint.hf_quantizer import register

    register()


class _Finder:
    """Finds one module, by way of all other finders, and is gone."""

    def __init__(self, module: str, act: Callable[[ModuleType], None]) -> None:
        self.module, self._act = module, act

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._act)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, and what is to be done after it."""

    def __init__(self, loader: Any, act: Callable[[ModuleType], None]) -> None:
        self._loader, self._act = loader, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._act(module)
