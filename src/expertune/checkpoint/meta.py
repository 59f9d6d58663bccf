"""A model on the meta device, of config.json alone: its modules, names and shapes, and no weights."""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from expertune.checkpoint.hub import refusal
from expertune.checkpoint.json_file import read_config
from expertune.errors import ConfigError


def build_meta_model(
    folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False, shapes_only: bool = False
) -> PreTrainedModel:
    """The model that a folder's config.json describes, with parameters on the meta device and real buffers.

    Args:
        folder: the model folder; nothing but its config.json counts.
        dtype: of the parameters.
        trust_remote_code: run Python that ships with the model.
        shapes_only: for names, shapes and sizes alone: nothing is initialized, which takes two thirds of the time on
            the meta device too, and buffers are as their modules make them.

    Raises:
        ConfigError: no config.json, a damaged one, or transformers cannot build a causal language model from it.
    """
    folder = Path(folder)
    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        initialized = no_init_weights() if shapes_only else nullcontext()
        with init_empty_weights(include_buffers=False), _NothingForMeta(), initialized:
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Values of wrong types and sizes end in whatever the family's own code stumbles over.
        where = folder / "config.json"
        raise ConfigError(f"{where}: transformers cannot build this model: {refusal(error)}") from None


def build_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config with transformers' own modules, its parameters on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "eager"  # not all that a loaded model may use is known to every part of it
    with init_empty_weights(include_buffers=False), _NothingForMeta():
        return type(model)(config)


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]:
    """What builds a config's model: a causal language model, or one that can take more than text where that is all."""
    known = (AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping)
    if type(config) in known[1] and type(config) not in known[0] and not hasattr(config, "auto_map"):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


class _NothingForMeta(TorchFunctionMode):
    """Make large tensors on the meta device at once, and fill none there.

    `init_empty_weights` lets a module allocate a parameter and moves it then: 30 GB for one layer of experts of the
    largest families, which a machine may refuse. Small ones stay real, because buffers are computed from them. Where
    there is no memory, torch goes through the drawing of random values without them, which takes most of the time.
    """

    _factories = (torch.empty, torch.zeros, torch.ones)
    _large = 2**26
    _fills = frozenset(("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "constant_", "fill_", "zero_"))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._fills:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if func in self._factories and "device" not in kwargs:
            sizes = args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= self._large:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def kept_dtype(plan: Mapping[str, torch.dtype], name: str, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a family keeps a tensor in whatever the model's is, by transformers' plan of name parts."""
    kept = (dtype for part, dtype in plan.items() if fnmatchcase(name, f"*{part}*"))
    return next(kept, otherwise)
