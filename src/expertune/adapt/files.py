"""Adapter files as stock PEFT reads them, both ways.

Where PEFT on transformers 5 reads it, the layout is the one that PEFT wrote when experts were separate linears, with
names as in the model's own checkpoint: `...block_sparse_moe.experts.3.w1.lora_A.weight`. PEFT on transformers 4, vLLM
and llama.cpp's converter read it too. Where it does not, it is PEFT's own for stacks (see `stock_layout`).
Only adapter tensors are written: PEFT by itself copies a whole output head in when the head is a target.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expertune.adapt.factors import PREFIX, Factors, PerExpert, dtype_in_file, fold, fuse, pad, unfold
from expertune.adapt.stock_trial import StockLayout
from expertune.adapt.validation import require_valid_config, require_valid_tensors
from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import read_metadata
from expertune.checkpoint.targets import Rank, ResolvedTargets
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.errors import CheckpointError
from expertune.experts.layout import fused_projections
from expertune.experts.lora import ExpertsLora
from expertune.storage import write_json

# No loader takes it for an adapter: some read every file that ends in .safetensors.
LIVE_NAME = "adapter_live.tensors"

SETTINGS = ("r", "alpha", "rslora", "rank_pattern", "alpha_pattern")

# In the metadata of the weights' file, as JSON: the run's own settings, and the fingerprint of the base model.
_SETTINGS_KEY = "expertune.lora"
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


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from.

    Attributes:
        base_model: what `adapter_config.json` names as the base: hub id or path.
        revision: commit of the base.
        settings: see `read_adapter_settings`.
    """

    base_model: str
    revision: str | None
    settings: dict[str, Any]


def live_targets(model: nn.Module, adapter: str = "default") -> ResolvedTargets:
    """What an adapter on a live model changes, with its ranks."""
    found = ResolvedTargets()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        if isinstance(module, ExpertsLora):
            found.experts[name] = {projection: Rank(*rank) for projection, rank in module.ranks[adapter].items()}
        else:
            kind = found.router if isinstance(module, ParamWrapper) else found.linears
            kind[name] = Rank(module.r[adapter], module.lora_alpha[adapter])
    return found


def tensors_in_file(model: nn.Module, names: NameMap, adapter: str, stock: StockLayout) -> list[Outgoing]:
    """The tensors of an adapter's file: scales folded into B, ranks filled up with zeros, names as the layout has them.

    Nothing is computed before a tensor's turn to be written comes.

    Args:
        model: the transformers model with adapters attached.
        names: its name map.
        adapter: the adapter's name.
        stock: how the file is laid out.
    """
    found: list[Outgoing] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        if isinstance(module, ExpertsLora) and name in stock.stacks:
            for weight, stem in stock.stacks[name].items():
                found += _stack_in_file(module, adapter, weight, stem, stock.expert_ranks[name], stock.r)
        elif isinstance(module, ExpertsLora):
            for projection, rank in stock.expert_ranks[name].items():
                factor = module.scale(adapter, projection) * rank / stock.r
                pairs = zip(module.lora_A[adapter][projection], module.lora_B[adapter][projection], strict=True)
                for expert, (a, b) in enumerate(pairs):
                    found += _pair_in_file(names.expert_on_disk(name, expert, projection), a, b, rank, factor)
        else:
            stem = name if name in stock.live_named else names.on_disk(name)
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            rank = stock.ranks[name]
            found += _pair_in_file(stem, a, b, rank, module.scaling[adapter] * rank / stock.r)
    return sorted(found, key=lambda outgoing: outgoing.name)


def _pair_in_file(stem: str, a: Tensor, b: Tensor, rank: int, factor: float) -> Iterator[Outgoing]:
    yield Outgoing(f"{PREFIX}{stem}.lora_A.weight", a.dtype, (rank, a.shape[1]), lambda: pad(a, rank, dim=0))
    yield Outgoing(
        f"{PREFIX}{stem}.lora_B.weight",
        dtype_in_file(b.dtype, factor),
        (b.shape[0], rank),
        lambda: fold(pad(b, rank, dim=1), factor),
    )


def _stack_in_file(
    module: ExpertsLora, adapter: str, weight: str, stem: str, ranks: dict[str, int], r: int
) -> Iterator[Outgoing]:
    """A and B of a stack as PEFT holds it; a projection without an adapter has zeros."""
    spec, projections = module.base_layer.spec, fused_projections(module.base_layer.spec, weight)
    held = [projection for projection in projections if projection in ranks]
    rank = ranks[held[0]]
    rows, columns = spec.shape(held[0])
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    factors = {projection: module.scale(adapter, projection) * rank / r for projection in held}
    dtype = max((dtype_in_file(b[each].dtype, factors[each]) for each in held), key=lambda dtype: dtype.itemsize)

    def fused() -> tuple[Tensor, Tensor]:
        nothing = a[held[0]].new_zeros(spec.num_experts, 0, columns), b[held[0]].new_zeros(spec.num_experts, rows, 0)
        pairs = [(a[each], fold(b[each], factors[each])) if each in held else nothing for each in projections]
        return fuse(spec, weight, pairs, rank)

    shape = (spec.num_experts * rank, columns)
    yield Outgoing(f"{PREFIX}{stem}.lora_A.weight", a[held[0]].dtype, shape, lambda: fused()[0])
    shape = (rows * len(projections), spec.num_experts * rank)
    yield Outgoing(f"{PREFIX}{stem}.lora_B.weight", dtype, shape, lambda: fused()[1].to(dtype))


@torch.no_grad()
def write_adapter(
    folder: str | Path,
    tensors: list[Outgoing],
    config: dict[str, Any],
    base: Fingerprint | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, each beside itself and then renamed.

    What other readers know nothing of goes into the metadata of the weights' file, which they pass over; PEFT takes no
    key that it does not know in `adapter_config.json`.

    Args:
        folder: where to; made where it is not there.
        tensors: see `tensors_in_file`. The same tensors give the same bytes.
        config: content of `adapter_config.json`.
        base: the base model.
        settings: see `read_adapter_settings`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {} if base is None else {_BASE_KEY: json.dumps(base.to_json(), sort_keys=True, separators=(",", ":"))}
    if settings is not None:
        metadata[_SETTINGS_KEY] = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata)
    write_json(folder / CONFIG_NAME, config)


@torch.no_grad()
def write_live_factors(folder: str | Path, model: nn.Module, names: NameMap, stock: StockLayout, adapter: str) -> None:
    """Beside an adapter's files, those factors B that do not come back from them to the bit.

    With them a run resumes as if it had not been interrupted, and scores the same when it is opened again.

    That a scale is in B costs a rounding where it is no power of two. Nothing is written where there are none.

    Args:
        folder: the checkpoint; its adapter has been written.
        model: the transformers model with the adapter attached.
        names: its name map.
        stock: how the adapter's file is laid out.
        adapter: the adapter's name.
    """
    given = {outgoing.name: outgoing for outgoing in tensors_in_file(model, names, adapter, stock)}
    config = stock.config
    plain = PerExpert(config, {key: outgoing.read() for key, outgoing in given.items()}, names, str(folder))
    kept = []
    for pair in live_pairs(model, names, adapter):
        file = _cut_back(plain, pair)
        if not torch.equal(unfold(file.b, pair.scale / file.scale, pair.b.dtype), pair.b):
            kept.append(
                Outgoing(f"{pair.name}.lora_B", pair.b.dtype, tuple(pair.b.shape), lambda held=pair.b: held)  # type: ignore[misc]
            )
    path = Path(folder) / LIVE_NAME
    if kept:
        write_tensors(path, sorted(kept, key=lambda outgoing: outgoing.name))
    else:
        path.unlink(missing_ok=True)


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


def stock_config(origin: Origin, stock: StockLayout) -> dict[str, Any]:
    """An `adapter_config.json` that every PEFT since 0.10 reads: essential keys only, dropout 0.

    Dropout only acts in training, and stock PEFT refuses any other value on fused experts, even to infer.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.base_model,
        "revision": origin.revision,
        **stock.config,
        "lora_dropout": 0.0,
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
        live: see `write_live_factors`.
        where: the folder, for errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] | None
    live: dict[str, Tensor]
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
    live = Path(folder) / LIVE_NAME
    try:
        factors = load_file(live) if live.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{live}: damaged ({error})") from None
    return AdapterFile(config, tensors, read_adapter_settings(folder), factors, str(folder))


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not a LoRA with one pair of factors per projection.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} here; is it an adapter folder?")
    config = read_mapping(path, fix="copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read")
    for key in ("use_dora", "modules_to_save", "alora_invocation_tokens", "layers_to_transform"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is set, which Expertune does not read")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only adapters without trained biases can be read")
    require_valid_config(path, config)
    return config


def read_adapter_settings(folder: str | Path) -> dict[str, Any] | None:
    """What the run that wrote an adapter had set, where the file tells: its own r, alpha, rslora and patterns.

    In `adapter_config.json` the scale is in B, and a rank may be filled up with zeros; these are what it was trained
    with, as keys of the run file's `lora:` section.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        values = json.loads(read_metadata(Path(folder) / WEIGHTS_NAME).get(_SETTINGS_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.keys() != set(SETTINGS):
        return None
    named = {"lora_alpha": values["alpha"], "use_rslora": values["rslora"]}
    require_valid_config(Path(folder) / WEIGHTS_NAME, values | named)
    return values


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
        tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(_COPIES)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    require_valid_tensors(path, tensors)
    return tensors


@torch.no_grad()
def load_adapter_tensors(
    model: nn.Module, names: NameMap, adapter: str, plain: PerExpert, factors: Mapping[str, Tensor] | None = None
) -> None:
    """Copy an adapter file's content into the live parameters of an adapter: every tensor, and no other.

    Whatever the file's layout and scales, the live adapter computes what the file says: B is divided by the scale that
    the live adapter has beyond the file's, and a rank that the file has filled up with zeros is cut back.

    Args:
        model: the transformers model with the adapter attached.
        names: its name map.
        adapter: the adapter's name.
        plain: the file's tensors under per-expert names.
        factors: factors B as they were live (see `write_live_factors`); taken where the file says the same.

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
        own = (factors or {}).get(f"{name}.lora_B")
        if own is not None and own.shape == b.shape and torch.equal(fold(own, pair.scale / scale), b):
            pair.b.copy_(own)
        else:
            pair.b.copy_(unfold(b, pair.scale / scale, pair.b.dtype))


def _cut_back(plain: PerExpert, live: LivePair) -> Factors:
    """What the file has for a live pair, without the zeros that only fill its rank up."""
    a, b = (plain.tensors[f"{PREFIX}{live.name}.lora_{factor}.weight"] for factor in "AB")
    scale = plain.scale(live.name, a.shape[0])
    rank = live.a.shape[0]
    if a.shape[0] == b.shape[-1] > rank and not (a[rank:].any(dim=1) & b[:, rank:].any(dim=0)).any():
        a, b = a[:rank], b[:, :rank]
    return Factors(a, b, scale)
