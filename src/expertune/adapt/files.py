"""Adapter files in stock PEFT's per-expert layout, both ways.

The layout is the one that PEFT wrote when experts were separate linears, with names as in the model's own checkpoint:
`...block_sparse_moe.experts.3.w1.lora_A.weight`. PEFT on transformers 4 and 5, vLLM and llama.cpp's converter all read
it.
Only adapter tensors are written: PEFT by itself copies a whole output head in when the head is a target.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import read_metadata
from expertune.checkpoint.store import Outgoing, write_tensors
from expertune.errors import CheckpointError
from expertune.experts.lora import ExpertsLora
from expertune.record import write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# In the metadata of the weights' file: the fingerprint of the base model, as JSON.
_BASE_KEY = "expertune.base"

_COPIES = (".base_layer.weight", "lm_head.weight", "embed_tokens.weight")


def adapter_tensors(model: nn.Module, names: NameMap, adapter: str = "default") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter under its name on disk; the tensors are views into the live parameters.

    Args:
        model: the transformers model (not the PeftModel around it) with adapters attached.
        names: its name map.
        adapter: the adapter's name.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        # A wrapped parameter keeps the module's name; what PEFT nests inside is the base, never another adapter.
        on_disk = names.on_disk(name)
        for factor in ("lora_A", "lora_B"):
            held = getattr(module, factor)[adapter]
            if not isinstance(module, ExpertsLora):
                yield f"{PREFIX}{on_disk}.{factor}.weight", held.weight
                continue
            for projection, stacked in held.items():
                for expert in range(stacked.shape[0]):
                    expert_name = names.expert_on_disk(name, expert, projection)
                    yield f"{PREFIX}{expert_name}.{factor}.weight", stacked[expert]


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
    if config.get("target_parameters"):
        raise CheckpointError(
            f"{path}: the adapter is in PEFT's fused layout (target_parameters), in which w1 and w3 share one factor; "
            "only the per-expert layout can be read"
        )
    for key in ("use_dora", "modules_to_save", "alora_invocation_tokens", "layers_to_transform"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is set, which Expertune does not read")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only adapters without trained biases can be read")
    if not isinstance(config.get("target_modules"), list):
        raise CheckpointError(f"{path}: target_modules must be a list of projection names")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise CheckpointError(f"{path}: {key} must be a number, got {config.get(key)!r}")
    return config


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
def load_adapter_tensors(
    model: nn.Module, names: NameMap, adapter: str, tensors: dict[str, Tensor], where: str
) -> None:
    """Copy tensors by name on disk into the live parameters of an adapter: every one, and no other.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not finite; nothing has been changed then.
    """
    live = dict(adapter_tensors(model, names, adapter))
    for what, keys in (("missing", live.keys() - tensors.keys()), ("unknown", tensors.keys() - live.keys())):
        if keys:
            first = sorted(keys)[0]
            raise CheckpointError(f"{where}: {len(keys)} {what} adapter tensors, the first is {first}")
    for key, parameter in live.items():
        if tensors[key].shape != parameter.shape:
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}"
            )
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"{where}: {key} holds NaN or infinite values")
    for key, parameter in live.items():
        parameter.copy_(tensors[key])
