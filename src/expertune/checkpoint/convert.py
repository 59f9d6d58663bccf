"""Checkpoint tensors that a live parameter is computed from: by transformers' own operations, an expert at a time.

Most experts lie on disk as the matrices that they are here, and need none of this (`NameMap.locate` says which). Others
are transposed, alternate the output features of gate and up, or share one list among several stacks; and beside the
experts a family may keep fused what it has apart in the live model. transformers says how, as a list of operations.
Where these work on each expert by itself they are handed one expert at a time, so that no stack of experts is ever in
memory.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    revert_weight_conversion,
)

from expertune.checkpoint.names import INDEX, Destination, NameMap
from expertune.checkpoint.reader import TensorEntry
from expertune.errors import CheckpointError

Sources = list[tuple[TensorEntry, Destination]]
"""Tensors on disk that one conversion takes, and where each belongs in it."""


# One tensor that a conversion makes: its live name, the first expert that it is of, and its values.
Converted = tuple[str, int, Tensor]


def convert(sources: Sources, names: NameMap, model: PreTrainedModel, wanted: range) -> Iterator[Converted]:
    """What comes of the tensors of one conversion, made expert by expert where that is the same.

    Experts that are not `wanted` are not read then.

    Raises:
        CheckpointError: a tensor that others have to be joined with is missing, or shapes do not fit.
    """
    sources = sorted(sources, key=lambda source: (source[1].expert or 0, source[0].key))
    first = sources[0][1]
    assert first.converter is not None
    weight, stacks = names.weight_of(first.name), names.stack_shapes()
    if weight is None or not is_by_expert(first.converter):
        yield from _convert(sources, 0, False, _Shapes(model, stacks))
        return
    num_experts = names.specs[weight[0]].num_experts
    # For operations that look at the shape of what they make.
    one = _Shapes(model, {name: (1, *shape[1:]) for name, shape in stacks.items()})
    if first.expert is not None:
        for expert in sorted({each.expert or 0 for _, each in sources}.intersection(wanted)):
            yield from _convert([source for source in sources if source[1].expert == expert], expert, False, one)
        return
    for entry, _ in sources:
        if entry.shape[0] != num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} has shape {entry.shape}, expected {num_experts} experts first"
            )
    for expert in wanted:
        yield from _convert(sources, expert, True, one)


def _convert(sources: Sources, expert: int, sliced: bool, model: "_Shapes") -> Iterator[Converted]:
    """One run of transformers' operations; `sliced` takes one expert of each tensor, which is a stack of them."""
    entry, first = sources[0]
    assert first.converter is not None
    _require_all(sources, first.converter)
    converter = copy.deepcopy(first.converter)
    for each, destination in sources:
        assert destination.pattern is not None
        tensor = each.read_part(expert).unsqueeze(0) if sliced else each.read()
        converter.collected_tensors[destination.pattern].append(tensor)
    try:
        converted = converter.convert(first.name, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{entry.shard}: tensor {entry.key} cannot be converted: {error}") from None
    for name, tensor in converted.items():
        yield name, expert, tensor[0] if isinstance(tensor, list) else tensor


def revert(
    live: Mapping[str, Tensor], destination: Destination, model: PreTrainedModel, shape: tuple[int, ...]
) -> Iterator[tuple[str, int | None, Tensor]]:
    """The way back: tensors on disk, from everything that one conversion makes.

    Args:
        live: by live name, all of `NameMap.converted_names(destination)` in that order; of stacks of experts one or
            all experts.
        destination: of one of the tensors on disk.
        model: the model.
        shape: of that tensor on disk, of as many experts: some families are read in either orientation.

    Yields:
        The pattern of a tensor's name, which of a list it is, and the tensor.
    """
    assert destination.converter is not None
    reverse = destination.converter.reverse_transform()
    for pattern, tensor in zip(reverse.source_patterns, live.values(), strict=True):
        reverse.collected_tensors[pattern].append(tensor)
    name = reverse.rename_source_key(next(iter(live)))[0]
    shapes = _Shapes(model, {name: shape})
    for key, found in reverse.convert(name, model=shapes, config=model.config).items():
        pattern = destination.converter.rename_source_key(key)[1]
        assert pattern is not None
        index = int(INDEX.findall(f"{key}.")[-1]) if "*" in pattern else None
        yield pattern, index, found[0] if isinstance(found, list) else found


def revert_all(live: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Live parameters by their names on disk, as `save_pretrained` of transformers 5.20 to 5.24 writes them.

    Args:
        live: by live name; what one conversion makes has to be there together.
        model: the model; its own tensors are not read.
    """
    return dict(revert_weight_conversion(model, dict(live)))


def _require_all(sources: Sources, converter: WeightConverter) -> None:
    found = [destination.pattern for _, destination in sources]
    # Scales of packed weights are called like the weight, and more; a checkpoint in 16 bits has none of them.
    plain = all(entry.dtype.is_floating_point and entry.dtype.itemsize > 1 for entry, _ in sources)
    counts = {
        pattern: found.count(pattern)
        for pattern in converter.source_patterns
        if pattern in found or not (plain and any(pattern.startswith(f"{weight}_") for weight in found))
    }
    if len(set(counts.values())) > 1:
        fewest, entry = min(counts, key=lambda pattern: counts[pattern]), sources[0][0]
        raise CheckpointError(
            f"{entry.shard}: tensor {entry.key} is only read together with those called {fewest!r}, of which there "
            f"are {counts[fewest]} instead of {max(counts.values())}"
        )


def is_by_expert(converter: WeightConverter) -> bool:
    """Whether operations on stacks [E, ...] leave the first dimension alone, save for stacking experts along it."""

    def leaves_alone(operation: Any) -> bool:
        if isinstance(operation, MergeModulelist):
            return operation.dim == 0
        if isinstance(operation, Transpose):
            return 0 not in (operation.dim0, operation.dim1)
        return isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim != 0

    return all(leaves_alone(operation) for operation in converter.operations)


class _Shapes:
    """What operations see as the model: parameters by name, and shapes of stacks of experts, which are not there."""

    def __init__(self, model: PreTrainedModel, stacks: dict[str, tuple[int, ...]]) -> None:
        self._model, self._stacks = model, stacks

    def get_parameter(self, name: str) -> Tensor:
        """A parameter of the model, or a tensor without memory in the shape of a stack."""
        if name in self._stacks:
            return torch.empty(self._stacks[name], device="meta")
        return self._model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
