"""Make transformers know NF4 folders once `expertune` is imported, before or after transformers itself.

transformers has no way to find a quantizer by itself, and importing it here would cost every command its start. So
where it has not been imported yet, a finder waits for the one module that keeps the list of quantizers, and adds to it
when that module has been executed.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer now if transformers keeps a list already, otherwise as soon as it does."""
    module = sys.modules.get(_REGISTRY)
    if module is not None and hasattr(module, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from expertune.checkpoint.hf_quantizer import register

    register()


class _Finder:
    """Finds one module, by way of all other finders, and is gone."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, and registration after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
