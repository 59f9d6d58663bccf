"""Adapter files in stock PEFT's per-expert layout, both ways.

The layout is the one that PEFT wrote when experts were separate linears, with names as in the model's own checkpoint:
`...block_sparse_moe.experts.3.w1.lora_A.weight`. PEFT on transformers 4 and 5, vLLM and llama.cpp's converter all read
it.
Only adapter tensors are written: PEFT by itself copies a whole output head in when the head is a target.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expertune.adapt.factors import PREFIX, Factors, PerExpert, unfold
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import read_metadata
from expertune.checkpoint.store import Outgoing, write_tensors
from expertune.errors import CheckpointError
from expertune.experts.lora import ExpertsLora
from expertune.record import write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

SETTINGS_KEY = "expertune.lora"
"""Key of the settings in the tensor file's metadata, which other readers leave alone."""

SETTINGS = ("r", "alpha", "rslora", "rank_pattern", "alpha_pattern")

# In the metadata of the weights' file: the fingerprint of the base model, as JSON.
_BASE_KEY = "expertune.base"

_COPIES = (".base_layer.weight", "lm_head.weight", "embed_tokens.weight")


class LivePair(NamedTuple):
    """The factors of one module of a live adapter, one expert of a stack by itself.

    Attributes:
        name: the module's name on disk.
        a: [r, in], a view into the live parameter.
        b: [out, r], the same.
        scale: what the live model multiplies by.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float


def live_pairs(model: nn.Module, names: NameMap, adapter: str = "default") -> Iterator[LivePair]:
    """The factors of an adapter on a live model.

    Args:
        model: the transformers model (not the PeftModel around it) with adapters attached.
        names: its name map.
        adapter: the adapter's name.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        # A wrapped parameter keeps the module's name; what PEFT nests inside is the base, never another adapter.
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if not isinstance(module, ExpertsLora):
            yield LivePair(names.on_disk(name), a.weight, b.weight, module.scaling[adapter])
            continue
        for projection in a:
            scale = module.scale(adapter, projection)
            for expert, (expert_a, expert_b) in enumerate(zip(a[projection], b[projection], strict=True)):
                yield LivePair(names.expert_on_disk(name, expert, projection), expert_a, expert_b, scale)


def adapter_tensors(model: nn.Module, names: NameMap, adapter: str = "default") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter by per-expert name on disk: views into the live parameters; see `live_pairs`."""
    for pair in live_pairs(model, names, adapter):
        yield f"{PREFIX}{pair.name}.lora_A.weight", pair.a
        yield f"{PREFIX}{pair.name}.lora_B.weight", pair.b


def write_adapter(
    folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any], base: Fingerprint | None = None
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, each beside itself and then renamed.

    Args:
        folder: where to; made where it is not there.
        tensors: by name on disk. The same tensors give the same bytes.
        config: content of `adapter_config.json`.
        base: the base model. It goes into the metadata of the weights' file, which other readers pass over; PEFT takes
            no key that it does not know in `adapter_config.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outgoing = [
        Outgoing(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for key, tensor in tensors.items()
    ]
    metadata = {} if base is None else {_BASE_KEY: json.dumps(base.to_json(), sort_keys=True, separators=(",", ":"))}
    write_tensors(folder / WEIGHTS_NAME, outgoing, metadata)
    write_json(folder / CONFIG_NAME, config)


def read_adapter_base(folder: str | Path) -> Fingerprint | None:
    """The base model that an adapter was trained on; None where its files do not say.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    metadata = read_metadata(Path(folder) / WEIGHTS_NAME)
    try:
        return Fingerprint.from_json(json.loads(metadata.get(_BASE_KEY, "null")))
    except (ValueError, RecursionError):
        return None


def stock_config(
    *,
    r: int,
    alpha: float,
    target_modules: list[str],
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
    rslora: bool,
    base_model: str,
    revision: str | None,
) -> dict[str, Any]:
    """An `adapter_config.json` that every PEFT since 0.10 reads: essential keys only, dropout 0.

    Dropout only acts in training, and stock PEFT refuses any other value on fused experts, even to infer.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(target_modules),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_version": peft.__version__,
    }


@dataclass
class AdapterFile:
    """The content of an adapter folder.

    Attributes:
        config: `adapter_config.json`.
        tensors: tensors by name on disk.
        settings: see `read_adapter_settings`.
        where: the folder, for errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] | None
    where: str

    def per_expert(self, names: NameMap) -> PerExpert:
        """The tensors under per-expert names; see `PerExpert`."""
        return PerExpert(self.config, self.tensors, names, self.where)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter folder.

    Raises:
        CheckpointError: see `read_adapter_config` and `read_adapter_tensors`.
    """
    config, tensors = read_adapter_config(folder), read_adapter_tensors(folder)
    return AdapterFile(config, tensors, read_adapter_settings(folder), str(folder))


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not a LoRA with one pair of factors per projection.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} here; is it an adapter folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read")
    for key in ("use_dora", "modules_to_save", "alora_invocation_tokens", "layers_to_transform"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is set, which Expertune does not read")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only adapters without trained biases can be read")
    if not isinstance(config.get("target_modules") or [], list):
        raise CheckpointError(f"{path}: target_modules must be a list of projection names")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise CheckpointError(f"{path}: {key} must be a number, got {config.get(key)!r}")
    return config


def read_adapter_settings(folder: str | Path) -> dict[str, Any] | None:
    """What the run that wrote an adapter had set, where the file tells: its own r, alpha, rslora and patterns.

    In `adapter_config.json` the scale is in B, and a rank may be filled up with zeros; these are what it was trained
    with, as keys of the run file's `lora:` section.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        values = json.loads(read_metadata(Path(folder) / WEIGHTS_NAME).get(SETTINGS_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and values.keys() == set(SETTINGS) else None


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by name on disk.

    Copies of frozen weights, which PEFT adds when the output head is a target, are left out.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS_NAME} here (pickled adapters are never loaded)")
    try:
        return {key: tensor for key, tensor in load_file(path).items() if not key.endswith(_COPIES)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, names: NameMap, adapter: str, plain: PerExpert) -> None:
    """Copy an adapter file's content into the live parameters of an adapter: every tensor, and no other.

    Whatever the file's layout and scales, the live adapter computes what the file says: B is divided by the scale that
    the live adapter has beyond the file's, and a rank that the file has filled up with zeros is cut back.

    Args:
        model: the transformers model with the adapter attached.
        names: its name map.
        adapter: the adapter's name.
        plain: the file's tensors under per-expert names.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not finite; nothing has been changed then.
    """
    where = plain.where
    live = {pair.name: pair for pair in live_pairs(model, names, adapter)}
    keys = {f"{PREFIX}{name}{ending}" for name in live for ending in (".lora_A.weight", ".lora_B.weight")}
    for what, found in (("missing", keys - plain.tensors.keys()), ("unknown", plain.tensors.keys() - keys)):
        if found:
            raise CheckpointError(f"{where}: {len(found)} {what} adapter tensors, the first is {min(found)}")
    given = {name: _cut_back(plain, pair) for name, pair in live.items()}
    for name, pair in live.items():
        for factor, tensor, parameter in (("A", given[name].a, pair.a), ("B", given[name].b, pair.b)):
            key = f"{PREFIX}{name}.lora_{factor}.weight"
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{where}: {key} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{where}: {key} holds NaN or infinite values")
    for name, pair in live.items():
        a, b, scale = given[name]
        pair.a.copy_(a)
        pair.b.copy_(unfold(b, pair.scale / scale, pair.b.dtype))


def _cut_back(plain: PerExpert, live: LivePair) -> Factors:
    """What the file has for a live pair, without the zeros that only fill its rank up."""
    a, b = (plain.tensors[f"{PREFIX}{live.name}.lora_{factor}.weight"] for factor in "AB")
    scale = plain.scale(live.name, a.shape[0])
    rank = live.a.shape[0]
    if a.shape[0] == b.shape[-1] > rank and not (a[rank:].any(dim=1) & b[:, rank:].any(dim=0)).any():
        a, b = a[:rank], b[:, :rank]
    return Factors(a, b, scale)
