"""What identifies a base model: its config's values, and hashes of a few of its weights.

An adapter is only worth something on the weights that it was trained on, and shapes alone do not tell two models of one
family apart. The fingerprint is small enough to travel with every adapter, costs a few short reads, and is
the same for a checkpoint and for the NF4 folder that was made of it: what stays unquantized is compared as bfloat16,
and of what is quantized the 4-bit codes of a few output features, which do not depend on how scales are held.

A part of the fingerprint that cannot be read from a checkpoint's headers and a few output features (experts that are
stored transposed, fused attention, weights that other tools packed) is absent. Two fingerprints are compared by what
both have. Scales that are not chosen by the largest magnitude give other codes, which a whole matrix decides: then the
fingerprint says how they are chosen, and the codes are left out.

One source has many 4-bit bases: `expertune.checkpoint.held` says which of them it is.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertune.checkpoint.formats.nf4_folder import ABSMAX, is_nf4_folder
from expertune.checkpoint.held import Held
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import TensorEntry
from expertune.checkpoint.recipe import linears_to_quantize
from expertune.experts.contract import ExpertsSpec
from expertune.experts.router import find_router
from expertune.kernels.nf4 import BLOCK_SIZE, quantize_matrix

_VERSION = 1

# Experts of a layer that are looked at, and output features of a matrix that are hashed, spread over all of it.
_NUM_EXPERTS = 8
_OF_CODES = ("linears", "experts")
_NUM_FEATURES = {"embeddings": 32, "output_head": 32, "routers": 8, "linears": 4, "experts": 2}

# Values of a config that do not change what the model computes, or that are written otherwise by other versions.
_NOT_THE_MODEL = (
    *("*dtype", "quantization_config", "transformers_version", "_*", "architectures", "auto_map", "use_cache"),
    *("*_token_id", "*dropout*", "*aux_loss*", "output_*", "initializer_*", "*max_position_embeddings", "return_dict"),
    *("id2label", "label2id", "pretraining_tp", "vision_config", "audio_config", "text_config", "task_specific_params"),
)

# Live name of a tensor, or experts module, projection and expert.
Place = tuple[str, str | None, int | None]
# A name that does not depend on how the weight is stored, and what reads its sample.
Sample = tuple[str, Callable[[], Tensor | None]]


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model.

    Attributes:
        config: values of config.json that decide what the model computes; lists and mappings as a hash.
        weights: hash by kind of weights: `embeddings`, `output_head`, `norms`, `routers`, `linears`, `experts`.
        held: which of the 4-bit bases of these weights it is.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    held: Held = field(default_factory=Held)

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as `from_json` reads it."""
        found = {"version": _VERSION, "config": dict(self.config), "weights": dict(self.weights)}
        return found | self.held.to_json()

    @classmethod
    def from_json(cls, values: Any, where: object) -> "Fingerprint | None":
        """A fingerprint that was kept; None where there is none, or one of a version that this one cannot compare.

        Args:
            values: what a file holds of it; anything, if somebody else has written it.
            where: that file, and the place in it, for messages.

        Raises:
            CheckpointError: see `Held.from_json`.
        """
        if not isinstance(values, dict) or values.get("version") != _VERSION:
            return None
        config, weights = values.get("config"), values.get("weights")
        if not isinstance(config, dict) or not isinstance(weights, dict):
            return None
        return cls(config, weights, Held.from_json(values, where))

    @property
    def of_source(self) -> "Fingerprint":
        """What of it identifies the 16-bit weights, whatever is in 4 bits."""
        return replace(self, held=Held())

    def differences(self, other: "Fingerprint") -> list[str]:
        """How another base differs from this one, in words; empty where nothing that both know of differs."""
        found = [
            f"{key} was {value} and is {other.config[key]}"
            for key, value in self.config.items()
            if key in other.config and other.config[key] != value
        ]
        for key, (was, now) in self.held.differences(other.held).items():
            what = "the calibration of quantization.fit" if key == "calibration" else f"quantization.{key}"
            found.append(f"{what} was {was} and is {now}")
        changed = [kind for kind, digest in self.weights.items() if other.weights.get(kind, digest) != digest]
        if changed:
            found.append(f"other weights ({', '.join(kind.replace('_', ' ') for kind in changed)})")
        return found


def read_fingerprint(
    folder: Path, tensors: Mapping[str, TensorEntry], model: nn.Module, names: NameMap, held: Held
) -> Fingerprint:
    """The fingerprint of a checkpoint.

    Args:
        folder: its folder; only config.json is read here.
        tensors: its tensors by name on disk; some may be missing.
        model: its model, with experts swapped or not, adapters not yet attached; the meta device is enough.
        names: the model's name map.
        held: see `held_by`.

    Raises:
        CheckpointError: a file ends inside a tensor.
    """
    stored = is_nf4_folder(folder)
    entries = _by_live_name(tensors, names, stored)
    weights: dict[str, str] = {}
    for kind, samples in _samples(model, names, entries, stored).items():
        digest = _hash(samples) if held.fit == ABSMAX or kind not in _OF_CODES else None
        if digest is not None:
            weights[kind] = digest
    return Fingerprint(_config_values(folder), weights, held)


def _config_values(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    text = values.get("text_config")
    values = values | (text if isinstance(text, dict) else {})
    return {
        key: value if isinstance(value, int | float | str) else _digest(json.dumps(value, sort_keys=True).encode())
        for key, value in sorted(values.items())
        if value is not None and not any(fnmatchcase(key, pattern) for pattern in _NOT_THE_MODEL)
    }


def _by_live_name(tensors: Mapping[str, TensorEntry], names: NameMap, stored: bool) -> dict[Place, TensorEntry]:
    """Tensors that lie on disk as they are in the model, by live name; an expert's by (module, projection, expert)."""
    if stored:
        return {(key, None, None): entry for key, entry in tensors.items()}
    found: dict[Place, TensorEntry] = {}
    for key, entry in tensors.items():
        place = names.locate(key)
        if place.converter is None:
            found[place.name, place.projection, place.expert] = entry
    return found


def _samples(
    model: nn.Module, names: NameMap, entries: Mapping[Place, TensorEntry], stored: bool
) -> dict[str, list[Sample]]:
    """By kind, what is hashed: a name that is the same however the weight is stored, and how its sample is read."""

    def floats(kind: str, name: str) -> Sample:
        return name, lambda: _floats(entries.get((name, None, None)), _NUM_FEATURES.get(kind))

    samples: dict[str, list[Sample]] = {
        "embeddings": [floats("embeddings", name) for name in _weight_of(model, "get_input_embeddings")],
        "output_head": [floats("output_head", name) for name in _weight_of(model, "get_output_embeddings")],
        "routers": [],
        "norms": [],
        "linears": [],
        "experts": [],
    }
    if samples["output_head"] and samples["output_head"][0][0] == samples["embeddings"][0][0]:
        del samples["output_head"]
    experts = tuple(f"{module}." for module in names.specs)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.startswith(experts):
            samples["norms"].append(floats("norms", name))
    for name, linear in linears_to_quantize(model, names.specs).items():
        entry, shape = entries.get((f"{name}.weight", None, None)), (linear.out_features, linear.in_features)
        samples["linears"].append((name, partial(_linear_codes, entry, shape, stored)))
    for module, spec in names.specs.items():
        router = find_router(module, model, spec)
        if router is not None:
            samples["routers"].append(floats("routers", f"{router}.weight"))
        for projection in spec.projections:
            for expert in _spread(spec.num_experts, _NUM_EXPERTS):
                read = partial(_expert_codes, entries, (module, projection, expert), spec, stored)
                samples["experts"].append((f"{module}.{expert}.{projection}", read))
    return samples


def _weight_of(model: nn.Module, getter: str) -> Iterator[str]:
    module = getattr(model, getter, lambda: None)()
    weight = getattr(module, "weight", None)
    for name, parameter in model.named_parameters():
        if weight is not None and parameter is weight:
            yield name


def _floats(entry: TensorEntry | None, num_features: int | None) -> Tensor | None:
    """Some output features of a weight, or all of it, as bytes that hold whatever float dtype it is stored in."""
    if entry is None or not entry.dtype.is_floating_point or not entry.numel:
        return None
    values = (
        entry.read()
        if num_features is None
        else entry.read_features(_spread(entry.numel // entry.shape[-1], num_features))
    )
    # What float16 cannot hold of a bfloat16 is left out: a folder may have been written in either.
    values = values.to(torch.bfloat16).clamp(-65280, 65280)
    return values.where(values.abs() >= 2**-14, 0).contiguous().view(-1).view(torch.uint8)


def _linear_codes(entry: TensorEntry | None, shape: tuple[int, int], stored: bool) -> Tensor | None:
    """4-bit codes of some output features of a linear."""
    out_features, in_features = shape
    features = _spread(out_features, _NUM_FEATURES["linears"])
    if entry is None:
        return None
    if stored and entry.dtype == torch.uint8:
        return _read_codes(entry, features, out_features * in_features // 2, in_features // 2)
    return _codes(entry, features) if entry.shape == shape else None


def _expert_codes(entries: Mapping[Place, TensorEntry], place: Any, spec: ExpertsSpec, stored: bool) -> Tensor | None:
    """4-bit codes of some output features of one expert's projection."""
    module, projection, expert = place
    out_features, in_features = spec.shape(projection)
    features = _spread(out_features, _NUM_FEATURES["experts"])
    parts = 1 if projection == "down" else len(spec.projections) - 1
    matrix = expert * parts + (0 if projection == "down" else spec.projections.index(projection))
    in_stack = [matrix * out_features + feature for feature in features]
    if stored:
        stack = "down" if projection == "down" else "gate_up"
        entry = entries.get((f"{module}.{stack}.packed", None, None))
        scales = entries.get((f"{module}.{stack}.absmax", None, None))
        if entry is None or scales is None or scales.numel * BLOCK_SIZE != entry.numel * 2:
            return None  # MXFP4's codes stand for other values than those that the same source becomes in NF4
        return _read_codes(
            entry, in_stack, spec.num_experts * parts * out_features * in_features // 2, in_features // 2
        )
    entry = entries.get((module, projection, expert))
    if entry is not None:
        return _codes(entry, features) if entry.shape == (out_features, in_features) else None
    fused = entries.get((module, "down" if projection == "down" else "gate_up", None)) or entries.get(
        (module, projection, None)
    )
    if fused is None or spec.is_transposed or not (spec.is_concatenated or parts == 1):
        return None
    weight = spec.weight_names[projection == "down"]
    return _codes(fused, in_stack) if fused.shape == spec.stack_shape(weight) else None


def _read_codes(entry: TensorEntry, features: list[int], nbytes: int, feature_bytes: int) -> Tensor | None:
    if entry.dtype != torch.uint8 or entry.nbytes != nbytes:
        return None
    return entry.read_features(features, feature_bytes).view(-1)


def _codes(entry: TensorEntry, features: list[int]) -> Tensor | None:
    """What these output features quantize to: each block of 64 weights by itself, so that their codes are their own."""
    if not entry.dtype.is_floating_point:
        return None
    values = entry.read_features(features)
    if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        values = values.float()
    try:
        return quantize_matrix(values.contiguous(), double_quantization=False)[0].view(-1)
    except ValueError:
        return None  # NaN, or a width that is not packed: the loader says so


def _spread(total: int, count: int) -> list[int]:
    """About as many indices as asked for, evenly over all of them, the last one included."""
    count = min(count, total)
    return sorted({index * total // count for index in range(count)} | {total - 1})


def _hash(samples: list[Sample]) -> str | None:
    """One hash of all samples; None where there are none, or one cannot be had."""
    digest = hashlib.sha256()
    for name, read in sorted(samples, key=lambda sample: sample[0]):
        values = read()
        if values is None:
            return None
        digest.update(name.encode() + b"\0")
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32] if samples else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
