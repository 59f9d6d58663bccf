"""Checkpoint tensors that a live parameter is computed from: by transformers' own operations, an expert at a time.

Most experts lie on disk as the matrices that they are here, and need none of this (`NameMap.locate` says which). Others
are transposed, alternate the output features of gate and up, or share one list among several stacks; and beside the
experts a family may keep fused what it has apart in the live model. transformers says how, as a list of operations.
Where these work on each expert by itself they are handed one expert at a time, so that no stack of experts is ever in
memory.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
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
)

from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import TensorEntry
from expertune.errors import CheckpointError

Sources = list[tuple[TensorEntry, Destination]]
"""Tensors on disk that one conversion takes, and where each belongs in it."""


@dataclass
class Part:
    """A conversion of some tensors, or of one expert's share of them.

    Attributes:
        name: first live parameter that comes of it.
        converter: transformers' operations.
        sources: the tensors.
        expert: the first expert whose weights come of it.
        sliced: each tensor is a stack of experts, of which one is taken.
        shapes: shapes of live stacks of experts, as far as they come of this part: for operations that look at them.
    """

    name: str
    converter: WeightConverter
    sources: Sources
    expert: int
    sliced: bool
    shapes: dict[str, tuple[int, ...]]

    def convert(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Live names and tensors.

        Raises:
            CheckpointError: a tensor that others have to be joined with is missing, or shapes do not fit.
        """
        self._require_all()
        converter = copy.deepcopy(self.converter)
        for entry, destination in self.sources:
            tensor = entry.read_part(self.expert).unsqueeze(0) if self.sliced else entry.read()
            assert destination.pattern is not None
            converter.collected_tensors[destination.pattern].append(tensor)
        entry = self.sources[0][0]
        try:
            converted = converter.convert(self.name, model=_Shapes(model, self.shapes), config=model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{entry.shard}: tensor {entry.key} cannot be converted: {error}") from None
        for name, tensor in converted.items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor

    def _require_all(self) -> None:
        found = [destination.pattern for _, destination in self.sources]
        counts = {pattern: found.count(pattern) for pattern in self.converter.source_patterns}
        entry = self.sources[0][0]
        if len(set(counts.values())) > 1:
            fewest = min(counts, key=lambda pattern: counts[pattern])
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} is only read together with those called {fewest!r}, of which there "
                f"are {counts[fewest]} instead of {max(counts.values())}"
            )


def parts_of(sources: Sources, names: NameMap) -> Iterator[Part]:
    """The parts in which the tensors of one conversion are converted: expert by expert where that is the same."""
    sources = sorted(sources, key=lambda source: (source[1].expert or 0, source[0].key))
    first = sources[0][1]
    assert first.converter is not None
    weight = names.weight_of(first.name)
    stacks = names.stack_shapes()
    if weight is None or not _is_by_expert(first.converter):
        yield Part(first.name, first.converter, sources, 0, False, stacks)
        return
    spec = names.specs[weight[0]]
    one = {name: (1, *shape[1:]) for name, shape in stacks.items()}
    sliced = first.expert is None
    for entry, _ in sources if sliced else []:
        if entry.shape[0] != spec.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} has shape {entry.shape}, expected {spec.num_experts} experts first"
            )
    experts = range(spec.num_experts) if sliced else sorted({each.expert or 0 for _, each in sources})
    for expert in experts:
        own = [source for source in sources if sliced or source[1].expert == expert]
        yield Part(first.name, first.converter, own, expert, sliced, one)


def _is_by_expert(converter: WeightConverter) -> bool:
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
