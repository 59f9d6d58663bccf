"""What of PEFT has no public name, in one place: read from PEFT 0.21.0 to 0.21.2.

`tests/adapt/test_internals.py` fails on a release that has changed one of them. What is wrapped rather than called is
listed in `expertune.registration`.
"""

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn


def is_refused(model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses to adapt a module of this name in this model."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def is_excluded(config: LoraConfig, key: str) -> bool:
    """Whether a config's `exclude_modules` takes a module of this name."""
    return isinstance(check_target_module_exists(config, key), _ExcludedModule)


def with_all_linear(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A config whose `all-linear` has been replaced, in place, by the names that it stands for in this model."""
    return _maybe_include_all_linear_layers(config, model)
