"""Fill a model from an NF4 folder, at reading speed: every tensor lies there as the model holds it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.formats.nf4_folder import BUFFERS, STACKS, Nf4Folder
from expertune.checkpoint.meta import kept_dtype
from expertune.checkpoint.nf4_linears import linear_of_bytes
from expertune.checkpoint.reader import Memory, TensorEntry
from expertune.checkpoint.touched import touched
from expertune.errors import CheckpointError
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack

# Name of an experts module and its buffers in the file, by name below the module -> the buffers as tensors.
ReadExperts = Callable[[str, Mapping[str, TensorEntry]], Mapping[str, Tensor]]

# Of a tensor that is held in another dtype than it is stored in.
_PIECE_BYTES = 8 * 2**20


def fill(
    model: PreTrainedModel,
    folder: Nf4Folder,
    dtype: torch.dtype,
    device: torch.device,
    read_experts: ReadExperts | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Read all tensors of a folder into a model whose experts have been swapped on the meta device.

    Args:
        model: the model; its 4-bit linears are still plain.
        folder: what to read.
        dtype: dtype of the 16-bit rest and of all products.
        device: where everything lives.
        read_experts: gives the buffers of an experts module, e.g. as views of the mapped file; None reads them onto
            the device.
        progress: called with (bytes placed, bytes in all).

    Returns:
        Names of tensors that the model has no place for.

    Raises:
        CheckpointError: a tensor is of another shape than the model's, or the file ends inside it; names it.
    """
    kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    experts = {name: _experts_entries(model, name, folder) for name in folder.experts}
    linears = {name: folder.linear_entries(name) for name in folder.linears}
    taken = {entry.key for module in (experts, linears) for entries in module.values() for entry in entries.values()}
    plain = [entry for key, entry in folder.index.tensors.items() if key not in taken]
    placed, total = 0, folder.index.nbytes
    sizes = [] if read_experts else [entry.nbytes for entries in experts.values() for entry in entries.values()]
    sizes += [entries["weight"].nbytes for entries in linears.values() if "weight" in entries]
    for entry in plain:
        if (slot := _slot(model, entry.key)) is not None:
            sizes.append(entry.numel * kept_dtype(kept, entry.key, slot.dtype).itemsize)
    # Elsewhere than on a CPU nothing of what is read stays in the memory that it is read into.
    with touched(sizes) if device.type == "cpu" else nullcontext(Memory()) as memory:
        for name, entries in experts.items():
            _fill_experts(model.get_submodule(name), entries, name, device, read_experts, memory)
            placed += sum(entry.nbytes for entry in entries.values())
            progress(placed, total)
        for name, entries in linears.items():
            _fill_linear(model, name, entries, (dtype, device), folder, memory)
        return [entry.key for entry in plain if not _fill_plain(model, entry, kept, device, memory)]


def missing_tensors(model: nn.Module, folder: Nf4Folder) -> list[str]:
    """Saved tensors of the model that the folder does not fill, tied ones aside."""
    have = folder.index.tensors
    parameters = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return sorted(name for name in parameters | buffers if name not in have)


def _module_of(model: nn.Module, name: str, folder: Nf4Folder) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{folder.folder}: the model of its config.json has no {name}; quantize the model again"
        ) from None


def _experts_entries(model: nn.Module, name: str, folder: Nf4Folder) -> dict[str, TensorEntry]:
    """What of an experts module is to be here, by name below it."""
    shard, entries = folder.experts_entries(name)
    experts = _module_of(model, name, folder)
    if not isinstance(experts, Nf4Experts):
        raise CheckpointError(f"{shard}: {name} has no experts in the model of config.json; quantize the model again")
    return own_part(experts, entries)


def _fill_experts(
    experts: nn.Module,
    entries: Mapping[str, TensorEntry],
    name: str,
    device: torch.device,
    read_experts: ReadExperts | None,
    memory: Memory,
) -> None:
    if read_experts:
        tensors = read_experts(name, entries)
    else:
        tensors = {key: entry.read(memory).to(device) for key, entry in entries.items()}
    for stack_name in STACKS:
        stack = experts.get_submodule(stack_name)
        assert isinstance(stack, Nf4Stack)
        # What `read_experts` gives is where it is to stay.
        stack.place(
            Nf4Bytes(*(tensors[f"{stack_name}.{buffer}"] for buffer in BUFFERS)), stays=read_experts is not None
        )


def own_part(experts: Nf4Experts, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The part of an experts module's buffers that is to be here, by experts or by bytes, and nothing of it read.

    Args:
        experts: the module.
        entries: its buffers in the file, by name below the module.

    Raises:
        CheckpointError: one is of another shape or dtype than the model's; names it.
    """

    def own(key: str, entry: TensorEntry) -> TensorEntry:
        stack_name, _, buffer = key.partition(".")
        stack = experts.get_submodule(stack_name)
        assert isinstance(stack, Nf4Stack)
        each = stack.num_matrices // len(experts.owned)
        if experts.parallel and entry.shape[:1] == (experts.num_experts * each,):
            entry = entry.part(experts.owned.start * each, stack.num_matrices)
        whole: Tensor = getattr(stack.whole, buffer)
        _require_shape(entry, whole)
        return entry if stack.part is None else entry.slice(stack.part.of(whole))

    return {key: own(key, entry) for key, entry in entries.items()}


def _require_shape(entry: TensorEntry, expected: Tensor) -> None:
    if tuple(expected.shape) != entry.shape or expected.dtype != entry.dtype:
        now = f"{tuple(expected.shape)} of {expected.dtype}"
        raise CheckpointError(
            f"{entry.shard}: tensor {entry.key} has shape {entry.shape} of {entry.dtype}, the model expects {now}; "
            "quantize the model again"
        )


def _fill_linear(
    model: nn.Module,
    name: str,
    entries: Mapping[str, TensorEntry],
    to: tuple[torch.dtype, torch.device],
    folder: Nf4Folder,
    memory: Memory,
) -> None:
    linear = _module_of(model, name, folder)
    weight = entries.get("weight")
    if weight is None or "absmax" not in entries:
        raise CheckpointError(f"{folder.folder}: missing tensors: {name}.weight; quantize the model again")
    if not isinstance(linear, nn.Linear) or weight.numel * 2 != linear.in_features * linear.out_features:
        raise CheckpointError(f"{weight.shard}: tensor {weight.key} does not fit the model; quantize the model again")
    stats = {part: entry.read() for part, entry in entries.items() if part != "weight"}
    try:
        quantized = linear_of_bytes(linear, weight.read(memory), stats, *to)
    except (ValueError, KeyError, AssertionError, AttributeError) as error:
        raise CheckpointError(
            f"{weight.shard}: the quantization state of {name} is damaged ({error!r}); quantize the model again"
        ) from None
    model.set_submodule(name, quantized)


def _fill_plain(
    model: nn.Module, entry: TensorEntry, kept: Mapping[str, torch.dtype], device: torch.device, memory: Memory
) -> bool:
    current = _slot(model, entry.key)
    if current is None:
        return False
    if tuple(current.shape) != entry.shape:
        raise CheckpointError(
            f"{entry.shard}: tensor {entry.key} has shape {entry.shape}, the model expects {tuple(current.shape)}"
        )
    placed = _read_as(kept_dtype(kept, entry.key, current.dtype), entry, device, memory)
    module_name, _, leaf = entry.key.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(placed, requires_grad=False)
    else:
        module._buffers[leaf] = placed
    return True


def _slot(model: nn.Module, key: str) -> Tensor | None:
    """What the model has at a tensor's place; None where it has no such place."""
    module_name, _, leaf = key.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return None
    return module._parameters.get(leaf, module._buffers.get(leaf))


def _read_as(dtype: torch.dtype, entry: TensorEntry, device: torch.device, memory: Memory) -> Tensor:
    """A tensor in some dtype; in another than its own on a CPU, it is read in pieces into memory that is used again."""
    if dtype == entry.dtype or device.type != "cpu" or not entry.shape:
        return entry.read(memory).to(device, dtype)
    placed = memory.take(entry.numel * dtype.itemsize).view(dtype).view(entry.shape)
    step, of_pieces = max(1, _PIECE_BYTES * len(placed) // max(entry.nbytes, 1)), Memory()
    for first in range(0, len(placed), step):
        part = entry.part(first, min(step, len(placed) - first))
        placed[first : first + step].copy_(part.read(of_pieces))
    return placed
