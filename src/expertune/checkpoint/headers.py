"""Names and shapes in the safetensors headers of a checkpoint, held to the model that its config describes.

Of a hub model nothing is downloaded beyond the index and the headers themselves (the first bytes of each shard, by a
range request).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import nn

from expertune.checkpoint.hub import fetch_headers
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import INDEX_NAME, open_checkpoint, read_weight_map
from expertune.errors import CheckpointError
from expertune.experts.layout import fused_projections

# A tensor's shape; None where only the index is here and not the shard.
Shape = tuple[int, ...] | None

# A weight by live name; for an expert's matrix the experts module, its projection and the expert.
_Weight = tuple[str, str | None, int | None]


@dataclass(frozen=True)
class Headers:
    """Tensors of a checkpoint by name on disk.

    Attributes:
        source: folder or hub id, for messages.
        shapes: name -> shape.
        nbytes: bytes of all tensors; None where neither header nor index says.
    """

    source: str
    shapes: Mapping[str, Shape]
    nbytes: int | None


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
    if on_hub and (fetched := fetch_headers(model, revision)):
        return Headers(model, *fetched)
    if not on_hub and any(folder.glob("*.safetensors")):
        index = open_checkpoint(folder)
        return Headers(model, {key: entry.shape for key, entry in index.tensors.items()}, index.nbytes)
    weight_map = read_weight_map(folder)
    if not weight_map:
        return None
    metadata = read_mapping(folder / INDEX_NAME).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Headers(model, dict.fromkeys(weight_map), size if isinstance(size, int) and size >= 0 else None)


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
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    filled: set[_Weight] = set()
    unused = []
    for key, shape in headers.shapes.items():
        weights, wanted = _filled_by(key, names, expected)
        for name, _, expert in weights:
            if expert is not None and expert >= names.specs[name].num_experts:
                raise CheckpointError(
                    f"{headers.source}: tensor {key} belongs to expert {expert}, but the config has "
                    f"{names.specs[name].num_experts}"
                )
        if shape is not None and wanted is not None and shape != wanted:
            raise CheckpointError(f"{headers.source}: tensor {key} has shape {shape}, the config asks for {wanted}")
        if not any(name in expected or name in names.specs for name, _, _ in weights):
            unused.append(key)
        filled.update(weights)
    _require_all(headers, model, names, filled)
    return unused


def _filled_by(key: str, names: NameMap, expected: Mapping[str, tuple[int, ...]]) -> tuple[list[_Weight], Shape]:
    """The weights that a tensor fills, and its shape; None where transformers makes something else of it first."""
    destination = names.locate(key)
    if destination.converter is not None:
        weights: list[_Weight] = []
        for live in names.converted_names(destination):
            stack = names.weight_of(live)
            weights += _of_stack(names, *stack) if stack else [(live, None, None)]
        return weights, None
    name, projection = destination.name, destination.projection
    if projection is None:
        return [(name, None, None)], expected.get(name)
    spec = names.specs[name]
    if destination.expert is not None:
        first = spec.projections[0] if projection == "gate_up" else projection
        return [(name, first, destination.expert)], spec.shape(first)
    stack_name = spec.weight_names[projection == "down"]
    return _of_stack(names, name, stack_name), spec.stack_shape(stack_name)


def _of_stack(names: NameMap, module: str, stack: str) -> list[_Weight]:
    """Every expert's matrices in one of a module's stacks."""
    spec = names.specs[module]
    return [(module, part, expert) for part in fused_projections(spec, stack) for expert in range(spec.num_experts)]


def _require_all(headers: Headers, model: nn.Module, names: NameMap, filled: set[_Weight]) -> None:
    counts = Counter((module, projection) for module, projection, _ in filled)
    parts = [(module, part) for module, spec in names.specs.items() for part in spec.projections]
    lacking = {each: names.specs[each[0]].num_experts - counts[each] for each in parts}

    def experts() -> Iterator[str]:
        for module, part in (each for each, count in lacking.items() if count):
            for expert in range(names.specs[module].num_experts):
                if (module, part, expert) not in filled:
                    yield names.expert_on_disk(module, expert, part) + ".weight"

    # A tied weight is stored under any one of its names.
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in names.specs:
            aliases.setdefault(id(parameter), []).append(name)
    others = [
        names.on_disk(shared[0])
        for shared in aliases.values()
        if not any((name, None, None) in filled for name in shared)
    ]
    # A config may ask for millions of experts: only as many are named as are told.
    missing = [*islice(experts(), 3), *others][:3]
    more = sum(lacking.values()) + len(others) - len(missing)
    if missing:
        raise CheckpointError(
            f"{headers.source}: the config asks for tensors that the checkpoint lacks: {', '.join(missing)}"
            + (f" and {more} more" if more else "")
        )
