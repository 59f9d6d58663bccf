"""What an update is multiplied by: as PEFT takes it from an adapter's config, or folded into B for other readers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertune.adapt.patterns import first_match


def scale_in_file(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies an update by: alpha / r, or alpha / sqrt(r) with rsLoRA; the first fitting pattern wins."""
    alpha = first_match(config.get("alpha_pattern") or {}, [name], config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def dtype_in_file(dtype: torch.dtype, factor: float) -> torch.dtype:
    """The dtype of B with a scale in it: float32 where its own would round the scale off."""
    return dtype if math.frexp(factor)[0] == 0.5 or dtype.itemsize >= 4 else torch.float32


def fold(b: Tensor, factor: float) -> Tensor:
    """B with a scale in it, rounded once, to `dtype_in_file`."""
    return b if factor == 1 else (b.double() * factor).to(dtype_in_file(b.dtype, factor))


def unfold(b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The way back; exact for powers of two, and where `fold` widened the dtype."""
    return b.to(dtype) if factor == 1 else (b.double() / factor).to(dtype)
