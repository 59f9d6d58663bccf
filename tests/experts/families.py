"""Every experts class of the installed transformers, built small."""

import functools
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)

# Names under which the families' configs hold their sizes.
SIZES = {
    "hidden_size": ("hidden_size", "moe_hidden_size"),
    "intermediate_size": ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
}


@functools.cache
def experts_classes() -> dict[str, Path]:
    """Class name -> the modeling file that defines it; read as text, because importing all of them takes long."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return {name: file for file in files for name in DECORATED.findall(file.read_text(encoding="utf-8"))}


def build_experts(
    class_name: str, hidden_size: int = 64, intermediate_size: int = 128, num_experts: int = 4
) -> nn.Module:
    """An experts module with random weights, whose forward is the family's own eager loop."""
    file = experts_classes()[class_name]
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    experts_class = getattr(module, class_name)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
    takes_size = "intermediate_size" in inspect.signature(experts_class.__init__).parameters
    apart = {"intermediate_size": intermediate_size} if takes_size else {}
    failures = []
    for config_class in _config_classes(module, class_name):
        config = config_class()
        for size, names in SIZES.items():
            for name in names:
                # A family with experts for each modality has a list here, and its experts take their size apart.
                if hasattr(config, name) and not isinstance(getattr(config, name), list):
                    setattr(config, name, sizes[size])
        config._experts_implementation = "eager"
        try:
            experts = experts_class(config, **apart)
        except (AttributeError, TypeError) as error:
            failures.append(f"{config_class.__name__}: {error}")
            continue
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return experts
    raise AssertionError(f"{class_name} takes none of its family's configs: {failures}")


def _config_classes(module: object, class_name: str) -> list[type[PretrainedConfig]]:
    """The family's configs, those for text before those that hold others, the one with the nearest name first."""
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PretrainedConfig) and value is not PretrainedConfig
    ]
    prefix = class_name.removesuffix("Experts")
    return sorted(classes, key=lambda value: (not value.__name__.startswith(prefix), value.__name__))


def random_routing(num_tokens: int, num_experts: int, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scores [T, K] as a router gives them: no expert twice for a token, scores that sum to one."""
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return index, torch.rand(num_tokens, top_k).softmax(dim=-1)


def from_matrices(spec: ExpertsSpec, weight: str, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """One expert's slice of a family's stack from its matrices: the way back from `layout.to_matrices`."""
    joined = layout.join_rows(spec, weight, matrices)
    return joined.T.contiguous() if spec.is_transposed else joined
