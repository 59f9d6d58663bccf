"""torch, imported when something of it is asked for.

transformers' tokenizers and configs say `import torch` and then use nothing of it, and that import is most of the time
of a command that only tokenizes. Python's own `importlib.util.LazyLoader` would do, but before 3.12 a second
`import torch` is enough to make it load. What is imported in the end is torch as it always is: any attribute, any
submodule and any `from torch import` brings all of it.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Unread(ModuleType):
    """torch before anything of it was asked for."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations or []
        try:
            spec.loader.exec_module(self)
        except BaseException:
            del sys.modules[spec.name]  # as an import that fails
            raise
        return getattr(self, name)


def import_torch_when_used() -> None:
    """From now on `import torch` does nothing until something of torch is used; for a process of one thread.

    Nothing changes where torch is imported already, or cannot be found.
    """
    if "torch" in sys.modules or (spec := find_spec("torch")) is None or spec.loader is None:
        return
    module = _Unread("torch")
    # Without `__path__`, for which Python asks before it imports a submodule.
    module.__spec__, module.__loader__, module.__file__, module.__package__ = spec, spec.loader, spec.origin, "torch"
    sys.modules["torch"] = module
