"""What is known of a model before a weight is read: its config, and the names and shapes in its safetensors headers.

Of a hub model nothing is downloaded beyond config.json, the index and the headers themselves (the first bytes of each
shard, by a range request).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from expertune.checkpoint.hub import CODE, fetch_headers, find_folder
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import INDEX_NAME, open_checkpoint, read_weight_map
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.contract import ExpertsSpec
from expertune.experts.layout import fused_projections

# Enough of a hub repository to build the model without weights.
_FILES = ["config.json", INDEX_NAME]

# Missing tensors that a message names.
_NAMED = 3


@dataclass(frozen=True)
class Headers:
    """Tensors of a checkpoint by name on disk.

    Attributes:
        source: folder or hub id, for messages.
        shapes: name -> shape, or None where only the index is here and not the shard.
        nbytes: bytes of all tensors; None where neither header nor index says.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...] | None]
    nbytes: int | None


def find_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Path, bool]:
    """Folder with the model's config.json, and whether it is a hub model's.

    Raises:
        ConfigError: there is no such folder, it has no config.json, or the hub did not give it; says what to do.
    """
    patterns = _FILES + (CODE if trust_remote_code else [])
    note = " (config.json alone is enough to plan)"
    folder, on_hub = find_folder(model, revision, patterns, ConfigError, "its config.json", note)
    if (folder / "config.json").is_file():
        return folder, on_hub
    if on_hub:
        raise ConfigError(f"model {model}: the repository has no config.json; is it a transformers model?")
    raise ConfigError(f"{folder / 'config.json'}: no such file; is {model} a model folder?")


def read_headers(model: str, folder: Path, revision: str | None, on_hub: bool) -> Headers | None:
    """Names and shapes of all tensors; None where there are no weights to look at (a config alone, no connection).

    Args:
        model: folder or hub id as the run file names it.
        folder: what `find_config` found.
        revision: branch, tag or commit of a hub model.
        on_hub: whether it is a hub model.

    Raises:
        CheckpointError: a shard's header is damaged, or the repository holds no safetensors.
    """
    if on_hub:
        fetched = fetch_headers(model, revision)
        return Headers(model, *fetched) if fetched else _index_alone(model, folder)
    if next(folder.glob("*.safetensors"), None) is None:
        return _index_alone(model, folder)
    index = open_checkpoint(folder)
    return Headers(model, {key: entry.shape for key, entry in index.tensors.items()}, index.nbytes)


def check_headers(headers: Headers, model: nn.Module, names: NameMap) -> list[str]:
    """Compare a checkpoint's tensors with the model that its config describes.

    Every parameter must have its tensor, of its shape; every expert its projections. Since shapes agree one by one, the
    numbers of parameters agree as well.

    Args:
        headers: the checkpoint's tensors.
        model: the model on the meta device, with tied weights tied.
        names: its name map.

    Returns:
        Names of tensors that the model has no place for, such as a family's extra prediction layers.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or meant for an expert that does not exist.
    """
    expected = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    found: set[tuple[str, str | None, int | None]] = set()
    unused = []
    for key, shape in headers.shapes.items():
        destination = names.locate(key)
        if destination.converter is not None:
            # Shapes before a conversion are transformers' own affair; the loader holds its results to the model.
            filled = _converted_parts(names, destination)
            found.update(filled)
            if not any(name in expected or name in names.specs for name, _, _ in filled):
                unused.append(key)
        elif destination.projection is not None:
            found.update(_expert_parts(headers, key, shape, destination, names.specs[destination.name]))
        elif destination.name not in expected:
            unused.append(key)
        else:
            _require_shape(headers, key, shape, tuple(expected[destination.name].shape))
            found.add((destination.name, None, None))
    _require_all(headers, model, names, found)
    return unused


def _expert_parts(
    headers: Headers, key: str, shape: tuple[int, ...] | None, destination: Destination, spec: ExpertsSpec
) -> list[tuple[str, str | None, int | None]]:
    """Which matrices a tensor of the experts fills: one, or a stack over experts with gate and up fused."""
    fused = spec.projections[:-1] if destination.projection == "gate_up" else (destination.projection,)
    if destination.expert is not None:
        if destination.expert >= spec.num_experts:
            raise CheckpointError(
                f"{headers.source}: tensor {key} belongs to expert {destination.expert}, but the config has "
                f"{spec.num_experts}"
            )
        _require_shape(headers, key, shape, spec.shape(fused[0] or ""))
        return [(destination.name, fused[0], destination.expert)]
    stack = spec.weight_names[destination.projection == "down"]
    _require_shape(headers, key, shape, spec.stack_shape(stack))
    return [(destination.name, part, expert) for part in fused for expert in range(spec.num_experts)]


def _converted_parts(names: NameMap, destination: Destination) -> list[tuple[str, str | None, int | None]]:
    """What a conversion fills, as far as names say it: all experts of a stack."""
    filled: list[tuple[str, str | None, int | None]] = []
    for live in names.converted_names(destination):
        weight = names.weight_of(live)
        if weight is None:
            filled.append((live, None, None))
            continue
        spec = names.specs[weight[0]]
        parts = fused_projections(spec, weight[1])
        filled += [(weight[0], part, expert) for part in parts for expert in range(spec.num_experts)]
    return filled


def _require_shape(headers: Headers, key: str, shape: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if shape is not None and shape != expected:
        raise CheckpointError(f"{headers.source}: tensor {key} has shape {shape}, the config asks for {expected}")


def _require_all(
    headers: Headers, model: nn.Module, names: NameMap, found: set[tuple[str, str | None, int | None]]
) -> None:
    # A config may ask for millions of experts: only as many are named as are told.
    missing: list[str] = []
    num_missing = 0
    counts = Counter((module, projection) for module, projection, expert in found if expert is not None)
    for module, spec in names.specs.items():
        for projection in spec.projections:
            have = counts[module, projection]
            num_missing += spec.num_experts - have
            for expert in range(spec.num_experts if have < spec.num_experts else 0):
                if len(missing) == _NAMED:
                    break
                if (module, projection, expert) not in found:
                    missing.append(names.expert_on_disk(module, expert, projection) + ".weight")
    # A tied weight is stored under any one of its names.
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in names.specs:
            aliases.setdefault(id(parameter), []).append(name)
    plain = [
        names.on_disk(shared[0])
        for shared in aliases.values()
        if not any((name, None, None) in found for name in shared)
    ]
    missing, num_missing = [*missing, *plain][:_NAMED], num_missing + len(plain)
    if missing:
        more = f" and {num_missing - _NAMED} more" if num_missing > _NAMED else ""
        raise CheckpointError(
            f"{headers.source}: the config asks for tensors that the checkpoint lacks: {', '.join(missing)}{more}"
        )


def _index_alone(model: str, folder: Path) -> Headers | None:
    """Names by the index of a folder whose shards are not here."""
    weight_map = read_weight_map(folder)
    if not weight_map:
        return None
    metadata = read_mapping(folder / INDEX_NAME).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Headers(model, dict.fromkeys(weight_map), size if isinstance(size, int) and size >= 0 else None)
