"""What importing `expertune` changes in transformers and PEFT: all of it is listed here, by module.

Two things are registered, and a cache is enlarged. transformers gets the quantizer of NF4 folders, so that
`from_pretrained` reads them. And `get_peft_model`, `PeftModel.from_pretrained`, `model.load_adapter`,
`model.add_adapter` and TRL's trainers end in a few functions that offer no hook for a module like `Nf4Experts`; each is
wrapped. Where the model holds 4-bit experts, Expertune's own function takes the call; every other model reaches the
original function and nothing else. The cache is that of the names in transformers' files: it reads all 2,900 of them
twice while it is imported, as they lie in more folders than the cache has room for.

Neither library discovers plugins (no entry points in transformers 5.20 to 5.24 or PEFT 0.21), and importing them here
would cost every command its start. So what has been imported already is changed at once, and one finder on
`sys.meta_path` changes the other modules listed here when they are executed. `tests/test_registration.py` fails on a
release that has moved one of them.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module that holds transformers' list of quantizers.
QUANTIZERS = "transformers.quantizers.auto"

# What is wrapped: module -> names in it, each with the function in `expertune.adapt` that takes the call. Such a
# function is given the original first, then the call's arguments.
WRAPPED = {
    "peft.tuners.tuners_utils": {"BaseTuner.inject_adapter": "stock.inject.inject_adapter"},
    "peft.tuners.lora.model": {"LoraModel._get_adapter_state_dict": "stock.save.adapter_state_dict"},
    "peft.utils.transformers_weight_conversion": {
        "convert_peft_config_for_transformers": "stock.inject.convert_config",
        "convert_peft_adapter_state_dict_for_transformers": "stock.load.convert_state_dict",
    },
    "peft.utils.hotswap": {
        "hotswap_adapter": "stock.inject.refuse_hotswap",
        "hotswap_adapter_from_state_dict": "stock.inject.refuse_hotswap",
        "prepare_model_for_compiled_hotswap": "stock.inject.refuse_hotswap",
    },
    "peft.peft_model": {
        "PeftModel.load_adapter": "stock.load.load_into_peft_model",
        "PeftModel.save_pretrained": "stock.save.save_peft_model",
        "PeftModel.get_nb_trainable_parameters": "stock.inject.num_parameters",
    },
    "transformers.modeling_utils": {"PreTrainedModel.save_pretrained": "stock.save.save_pretrained"},
    "transformers.integrations.peft": {"PeftAdapterMixin.load_adapter": "stock.load.load_adapter"},
}

# What is cached there with too little room: module -> functions in it.
ENLARGED = {"transformers.utils.import_utils": ("create_import_structure_from_path",)}

_CHANGED = (QUANTIZERS, *WRAPPED, *ENLARGED)


def register() -> None:
    """Change what has been imported now, and the rest when it is imported; a second call changes nothing."""
    for name in (QUANTIZERS, *WRAPPED):
        module = sys.modules.get(name)
        # A module that is being imported just now is in `sys.modules` too, and has none of its names yet.
        names = [path.partition(".")[0] for path in WRAPPED.get(name, ("register_quantizer",))]
        if module is not None and any(hasattr(module, each) for each in names):
            _change(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _change(module: ModuleType) -> None:
    if module.__name__ == QUANTIZERS:
        import_module("expertune.checkpoint.hf_quantizer").register()
    for name in ENLARGED.get(module.__name__, ()):
        held: Any = getattr(module, name, None)
        if hasattr(held, "cache_parameters"):  # else another release, which may do without
            setattr(module, name, cache(held.__wrapped__))
    for path, taker in WRAPPED.get(module.__name__, {}).items():
        holder, _, name = path.rpartition(".")
        owner = getattr(module, holder, None) if holder else module
        if hasattr(owner, name):
            _wrap(owner, name, taker)
        else:
            warnings.warn(
                f"{module.__name__} has no {path}: with this release, adapters that PEFT or transformers puts on a "
                "model with 4-bit experts leave the experts out; attach them by expertune.attach",
                stacklevel=2,
            )


def _wrap(owner: Any, name: str, taker: str) -> None:
    held = owner.__dict__.get(name, getattr(owner, name))
    is_classmethod = isinstance(held, classmethod)
    original = held.__func__ if is_classmethod else held
    if getattr(original, "expertune", False):
        return
    wrapper = _guarded(original, taker)
    setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)


def _guarded(original: Callable[..., Any], taker: str) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A model with 4-bit experts cannot be there before their module is.
        if "expertune.experts.module" in sys.modules:
            from torch import nn

            from expertune.experts.module import holds_experts

            if any(holds_experts(each) for each in (*args, *kwargs.values()) if isinstance(each, nn.Module)):
                file, _, name = taker.rpartition(".")
                return getattr(import_module(f"expertune.adapt.{file}"), name)(original, *args, **kwargs)
        return original(*args, **kwargs)

    call.expertune = True  # type: ignore[attr-defined]
    return call


class _Finder:
    """Finds the modules listed above, by way of all other finders, and changes each once it has been executed."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _CHANGED or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                _change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
