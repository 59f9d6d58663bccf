"""Validation of an adapter's files: they are untrusted, and what they ask for is built before it is compared."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from expertune.adapt.factors import MAGNITUDE, PREFIX
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import short
from expertune.checkpoint.targets import ResolvedTargets
from expertune.errors import CheckpointError

_LARGEST_RANK = 2**16


def require_valid_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an `adapter_config.json` whose values are of the wrong kind.

    Raises:
        CheckpointError: names the key.
    """
    problem = None
    if not _is_rank(config.get("r")):
        problem = f"r must be a number from 1 to {_LARGEST_RANK}, got {_text(config.get('r'))}"
    elif not _is_alpha(config.get("lora_alpha")):
        problem = f"lora_alpha must be a number above 0, got {_text(config.get('lora_alpha'))}"
    elif type(config.get("use_rslora") or False) is not bool:
        problem = f"use_rslora must be true or false, got {_text(config['use_rslora'])}"
    elif type(config.get("use_dora") or False) is not bool:
        problem = f"use_dora must be true or false, got {_text(config['use_dora'])}"
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            problem = problem or f"{key} must be a mapping, got {_text(patterns)}"
            continue
        for name, value in patterns.items():
            if not fits(value):
                problem = problem or f"{key}: {short(name)} cannot be {_text(value)}"
            try:
                re.compile(name)
            except (re.error, RecursionError, OverflowError) as error:
                problem = problem or f"{key}: {short(name)!r} is not a regular expression ({error})"
    for key in ("target_modules", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problem = problem or f"{key} must be a list of names, got {_text(names)}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def require_valid_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no factors of an update.

    Raises:
        CheckpointError: names the tensor.
    """
    for key, tensor in tensors.items():
        if tensor.ndim != (1 if key.endswith(MAGNITUDE) else 2) or not tensor.numel() or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: tensor {short(key)} of shape {tuple(tensor.shape)} and {tensor.dtype} is no factor of an "
                "adapter: these are matrices of floating-point numbers"
            )


def require_ranks_in_file(where: str, targets: ResolvedTargets, names: NameMap, tensors: Mapping[str, Tensor]) -> None:
    """Refuse ranks above those of the file's tensors, before memory is taken for them.

    Args:
        where: the adapter.
        targets: what is about to be built.
        names: the base model's name map.
        tensors: the file's tensors under per-expert names on disk.

    Raises:
        CheckpointError: names the module.
    """
    wanted = {names.on_disk(name): rank.rank for name, rank in (targets.linears | targets.router).items()}
    for module, ranks in targets.experts.items():
        for projection, of_experts in ranks.items():
            experts = names.experts_on_disk(module, projection)
            held = next((name for name in experts if f"{PREFIX}{name}.lora_A.weight" in tensors), experts[0])
            wanted[held] = of_experts.rank
    for name, rank in wanted.items():
        factor = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        if factor is not None and rank > factor.shape[0]:
            raise CheckpointError(
                f"{where}: {name} has rank {rank} by the adapter's settings, and {factor.shape[0]} by its tensors"
            )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9 and math.isfinite(value)


def _text(value: Any) -> str:
    return repr(value)[:60]
