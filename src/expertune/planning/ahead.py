"""A model's first plan, made ahead in a copy of the process that goes without what no shape depends on.

Building a model imports transformers' `modeling_utils`, and that torch's compiler, its distributed tensors and scipy,
for classes of which building one uses none: two of five seconds of CPU time. A process without them is no place to
train in. So a copy of this one plans and keeps what it has read (`expertune.planning.recall`); then this one plans, and
finds it. Where the copy failed, for whatever reason, nothing is kept, and the model is read here as it always is.
"""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from expertune.kernels.processor import processor

# Packages that stay away: transformers does without the first, and takes classes and decorators of the others.
_MISSING = "scipy"
_COMPILER = "torch._dynamo"
_UNUSED = (_COMPILER, "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp")


def plan_ahead(plan: Callable[[], object]) -> Callable[[], None]:
    """Start a plan in a copy of this process; on Linux, and where no other thread may hold a lock.

    Args:
        plan: makes and keeps it.

    Returns:
        Waits until it has ended.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return lambda: None
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of threads that are not there
        child = os.fork()
    if child:

        def wait() -> None:
            os.waitpid(child, 0)

        return wait
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        gc.disable()
        processor()  # kept on a machine's first plan, which it would not be once torch is there
        go_without()
        plan()
    finally:
        os._exit(0)  # whoever waits plans in any case


def go_without() -> None:
    """Import torch, and keep the packages that are not needed away from all that is imported later in this process."""
    import torch.nn  # noqa: F401

    sys.modules[_MISSING] = None  # type: ignore[assignment]
    sys.meta_path.insert(0, _Finder())


class _Nothing:
    """Any class or context of a package that stays away."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: Any) -> None: ...


class _NoAnswer(_Nothing):
    """What a function of the compiler gives."""

    def __bool__(self) -> bool:
        raise RuntimeError("the compiler was asked, and stays away")


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "disable":
            return _same
        return _NoAnswer if self.__name__.startswith(_COMPILER) else _Nothing


def _same(function: Any = None, *_: Any, **__: Any) -> Any:
    """`torch._dynamo.disable`, as a decorator with and without arguments."""
    return function if function is not None else _same


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        stays_away = any(f"{name}.".startswith(f"{package}.") for package in _UNUSED)
        return ModuleSpec(name, self, is_package=True) if stays_away else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...
