"""What an adapter adds to each tensor of a 16-bit checkpoint, as that tensor lies on disk.

Most tensors are matrices as they are in the live model, or stacks of these. What transformers converts on the way in
(transposed stacks, alternating output features, fused attention) goes the way back by its own operations reversed, an
expert at a time where they work on each expert by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expertune.checkpoint.convert import is_by_expert, revert
from expertune.checkpoint.names import Destination
from expertune.checkpoint.reader import TensorEntry
from expertune.errors import ExportError, option
from expertune.exporting.source import ExportSource

Update = tuple[Tensor, Tensor] | Tensor
"""Left and right, whose product is added; or what is added itself."""


@dataclass(frozen=True)
class Addition:
    """What is added to one tensor on disk.

    Attributes:
        num_parts: how many elements of its first dimension are added to one by one; 1 for all of it at once.
        part: gives what is added to one of them, as rows of the tensor's last dimension.
        magnitude: gives what the rows of one of them are then scaled to; None leaves them. See `magnitudes`.
    """

    num_parts: int
    part: Callable[[int], Update]
    magnitude: Callable[[int], Tensor] | None = None


def find_additions(source: ExportSource) -> dict[str, Addition]:
    """By name on disk, what is added to each tensor that the adapter changes.

    Raises:
        ExportError: something that the adapter changes has no tensor of its own.
    """
    found: dict[str, Addition] = {}
    changed, reached = set(source.changed), set[str]()
    for key, entry in source.index.tensors.items():
        destination = source.names.locate(key)
        names = live_names(source, destination)
        if changed.isdisjoint(names):
            continue
        reached.update(names)
        found[key] = _addition(source, entry, destination, names)
    if missing := changed - reached:
        raise ExportError(
            f"{source.base.folder}: {min(missing)} has no tensor of its own in the checkpoint (it may share that of "
            "the embedding), so that nothing can be merged into it; export the adapter by itself, e.g. with --to peft"
        )
    return found


def live_names(source: ExportSource, destination: Destination) -> list[str]:
    """The live parameters that a tensor on disk has a part in."""
    if destination.converter is not None:
        return source.names.converted_names(destination)
    if destination.projection is None:
        return [destination.name]
    first, down = source.names.specs[destination.name].weight_names
    return [f"{destination.name}.{down if destination.projection == 'down' else first}"]


def _addition(source: ExportSource, entry: TensorEntry, destination: Destination, names: list[str]) -> Addition:
    name, projection, expert = destination.name, destination.projection, destination.expert
    if source.uses_dora and (
        destination.converter is not None or (projection and source.names.specs[name].is_transposed)
    ):
        raise ExportError(
            f"{entry.shard}: {entry.key} does not lie on disk with an output feature in each row, as DoRA's magnitudes "
            f"need it; merge into the values that the adapter was trained beside with {option('base', 'dequantized')}"
        )
    if destination.converter is not None:
        return _converted(source, entry, destination, names)
    if projection is None:
        linear = name.removesuffix(".weight")
        return Addition(1, lambda _: source.linear_update(linear), _of(source.factors.linears[linear].magnitude))
    if expert is not None:
        pairs = source.factors.experts[name].get(projection)
        update = partial(_expert_update, source, name, projection, expert)
        return Addition(1, lambda _: update(), _of(None if pairs is None else pairs[expert].magnitude))
    weight = names[0].rpartition(".")[2]

    def of_stack(index: int) -> Update:
        left, right = source.stack_update(name, weight, slice(index, index + 1))
        return left[0], right[0]

    def magnitude(index: int) -> Tensor:
        return source.stack_magnitudes(name, weight, slice(index, index + 1))[0]

    return Addition(entry.shape[0], of_stack, magnitude if source.uses_dora else None)


def _of(magnitude: Tensor | None) -> Callable[[int], Tensor] | None:
    return None if magnitude is None else lambda _: magnitude


def _expert_update(source: ExportSource, module: str, projection: str, expert: int) -> Update:
    """One expert's matrix [out, in]; nothing where gate or up alone is adapted, and this is the other."""
    pairs = source.factors.experts[module].get(projection)
    if pairs is None:
        outputs, inputs = source.names.specs[module].shape(projection)
        return torch.zeros(outputs, 0), torch.zeros(0, inputs)
    a, b, scale, _ = pairs[expert]
    return b.float() * scale, a.float()


def _converted(source: ExportSource, entry: TensorEntry, destination: Destination, names: list[str]) -> Addition:
    """What is added to a tensor that transformers converts, by its operations reversed."""
    assert destination.converter is not None
    of_experts = source.names.weight_of(names[0]) is not None
    by_expert = of_experts and is_by_expert(destination.converter)
    is_list = destination.expert is not None

    def part(index: int) -> Update:
        expert = (destination.expert or 0) if is_list else index
        experts = slice(expert, expert + 1) if by_expert else slice(None)
        shape = entry.shape if is_list or not by_expert else (1, *entry.shape[1:])
        live = {name: _whole_update(source, name, experts) for name in names}
        wanted = (0 if by_expert else destination.expert) if is_list else None
        for pattern, number, tensor in revert(live, destination, source.model, shape):
            if pattern == destination.pattern and number == wanted:
                return tensor.reshape(-1, entry.shape[-1])
        raise ExportError(f"{entry.shard}: transformers cannot convert {entry.key} back; export the adapter by itself")

    return Addition(entry.shape[0] if by_expert and not is_list else 1, part)


def _whole_update(source: ExportSource, name: str, experts: slice) -> Tensor:
    """What is added to a live parameter, zeros included."""
    weight = source.names.weight_of(name)
    if name in source.changed:
        left, right = (
            source.stack_update(*weight, experts) if weight else source.linear_update(name.removesuffix(".weight"))
        )
        return left @ right
    shape = source.names.stack_shapes().get(name) or source.model.get_parameter(name).shape
    return torch.zeros(shape)[experts] if weight else torch.zeros(shape)
