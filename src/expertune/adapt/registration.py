"""Make PEFT's calls, and transformers' own for adapters, do on 4-bit experts what they do on a model of linears.

`get_peft_model`, `PeftModel.from_pretrained`, `model.load_adapter`, `model.add_adapter` and TRL's trainers end in a few
functions that offer no hook for a module like `Nf4Experts`. Each is wrapped here once its module has been imported:
where the model holds 4-bit experts, Expertune's own function takes the call, and every other model is none of its
business. Read from PEFT 0.21.2 and transformers 5.20 to 5.24; `tests/adapt/test_registration.py` tells when a release
has moved one of them.
"""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from expertune.checkpoint.registration import when_imported

# What is wrapped: module -> names in it, each with the function in `expertune.adapt` that takes the call. Such a
# function is given the original first, then the call's arguments.
WRAPPED = {
    "peft.tuners.tuners_utils": {"BaseTuner.inject_adapter": "calls.inject_adapter"},
    "peft.tuners.lora.model": {"LoraModel._get_adapter_state_dict": "calls.adapter_state_dict"},
    "peft.utils.transformers_weight_conversion": {
        "convert_peft_config_for_transformers": "calls.convert_config",
        "convert_peft_adapter_state_dict_for_transformers": "calls.convert_state_dict",
    },
    "peft.utils.hotswap": {
        "hotswap_adapter": "calls.refuse_hotswap",
        "hotswap_adapter_from_state_dict": "calls.refuse_hotswap",
        "prepare_model_for_compiled_hotswap": "calls.refuse_hotswap",
    },
    "peft.peft_model": {
        "PeftModel.load_adapter": "calls.load_into_peft_model",
        "PeftModel.save_pretrained": "stock_files.save_peft_model",
        "PeftModel.get_nb_trainable_parameters": "calls.num_parameters",
    },
    "transformers.modeling_utils": {"PreTrainedModel.save_pretrained": "stock_files.save_pretrained"},
    "transformers.integrations.peft": {"PeftAdapterMixin.load_adapter": "calls.load_adapter"},
}


def register_with_peft() -> None:
    """Wrap the functions now where their modules have been imported, otherwise as soon as they are."""
    for module, names in WRAPPED.items():
        first = next(iter(names)).partition(".")[0]
        when_imported(module, first, _wrap_all)


def _wrap_all(module: ModuleType) -> None:
    for path, taker in WRAPPED[module.__name__].items():
        holder, _, name = path.rpartition(".")
        owner = getattr(module, holder, None) if holder else module
        if not hasattr(owner, name):
            warnings.warn(
                f"{module.__name__} has no {path}: with this release, adapters that PEFT or transformers puts on a "
                "model with 4-bit experts leave the experts out; attach them by expertune.adapt.attach",
                stacklevel=2,
            )
            continue
        _wrap(owner, name, taker)


def _wrap(owner: Any, name: str, taker: str) -> None:
    held = owner.__dict__.get(name, getattr(owner, name))
    is_classmethod = isinstance(held, classmethod)
    original = held.__func__ if is_classmethod else held
    if hasattr(original, "__wrapped__") and getattr(original, "expertune", False):
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
                file, _, name = taker.partition(".")
                return getattr(import_module(f"expertune.adapt.{file}"), name)(original, *args, **kwargs)
        return original(*args, **kwargs)

    call.expertune = True  # type: ignore[attr-defined]
    return call
