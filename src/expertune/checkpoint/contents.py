"""The tensors of one file of an NF4 folder, a decoder layer's or all the rest's, in the form they are saved in."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from expertune.checkpoint.formats.interface import Piece
from expertune.checkpoint.formats.nf4_folder import BUFFERS, STACKS
from expertune.checkpoint.jobs import saved_tensors
from expertune.checkpoint.loader import Loader
from expertune.checkpoint.reader import TensorEntry
from expertune.checkpoint.writer import Outgoing
from expertune.experts.module import Nf4Experts
from expertune.kernels.huge_pages import ask_for_huge_pages
from expertune.kernels.nf4 import Nf4Stack

# A weight of the source and its tensors by part.
Weight = tuple[Piece, dict[str, TensorEntry]]


def layer_tensors(
    loader: Loader, layer_name: str, weights: Iterable[Weight], where: Path
) -> tuple[list[Outgoing], list[str]]:
    """Place the weights of one decoder layer, and hand out what the layer then holds.

    Args:
        loader: the model, its experts without bytes.
        layer_name: the layer's live name.
        weights: everything of the source that belongs to it.
        where: the source, for errors.

    Returns:
        What is to be written, and names on disk of what the model has no place for.

    Raises:
        CheckpointError: a tensor is missing or wrong; names it.
    """
    layer = loader.model.get_submodule(layer_name)
    for module in layer.modules():
        if isinstance(module, Nf4Stack):
            module.to_empty(device="cpu")
            ask_for_huge_pages(module.packed)
    left_out = [piece.key for piece, entries in weights if not loader.place_piece(piece, entries)]
    left_out += loader.place_converted()
    loader.check_complete(where, lambda name: name.startswith(f"{layer_name}."))
    buffers = [f"{stack}.{buffer}" for stack in STACKS for buffer in BUFFERS]
    experts = [name for name, module in layer.named_modules(prefix=layer_name) if isinstance(module, Nf4Experts)]
    aligned = [f"{name}.{buffer}" for name in experts for buffer in buffers]
    state = layer.state_dict(prefix=f"{layer_name}.")
    return [
        Outgoing(name, state[name].dtype, tuple(state[name].shape), partial(state.__getitem__, name), name in aligned)
        for name in [*aligned, *(state.keys() - set(aligned))]
    ], left_out


def rest_tensors(
    loader: Loader, layers: tuple[str, ...], weights: Iterable[Weight], where: Path
) -> tuple[list[Outgoing], list[str]]:
    """Everything outside the decoder layers, each read when its turn comes: embeddings may be larger than a layer.

    Arguments and results are `layer_tensors`' own; `layers` are the live names of all decoder layers.

    Raises:
        CheckpointError: a tensor is missing; names it. A wrong one is named when it is read.
    """
    model, names = loader.model, loader.names
    model.tie_weights()
    prefixes = tuple(f"{layer}." for layer in layers)
    known = model.state_dict().keys()
    wanted = {name: tensor for name, tensor in saved_tensors(model).items() if not name.startswith(prefixes)}
    outgoing, left_out = [], []
    for piece, entries in weights:
        destination = names.locate(piece.key)
        current = wanted.get(destination.name)
        if piece.format is None and destination.converter is None and current is not None:
            entry = entries["weight"]
            dtype = loader.stored_dtype(destination.name, current, entry.dtype)
            outgoing.append(
                Outgoing(destination.name, dtype, tuple(current.shape), partial(_take, loader, piece, entries))
            )
        elif destination.converter is not None or piece.format is not None:
            if not loader.place_piece(piece, entries):
                left_out.append(piece.key)
        elif destination.name not in known:
            left_out.append(piece.key)
    left_out += loader.place_converted()
    streamed = {tensor.name for tensor in outgoing}
    placed = {name: tensor for name, tensor in saved_tensors(model).items() if name in wanted and name not in streamed}
    loader.check_complete(where, lambda name: name in placed)
    outgoing += [Outgoing(name, tensor.dtype, tuple(tensor.shape), tensor.detach) for name, tensor in placed.items()]
    return outgoing, left_out


def _take(loader: Loader, piece: Piece, entries: dict[str, TensorEntry]) -> Tensor:
    """Place one tensor, with all checks of it, and take it out of the model again."""
    loader.place_piece(piece, entries)
    module_name, _, leaf = loader.names.locate(piece.key).name.rpartition(".")
    module = loader.model.get_submodule(module_name)
    slots = module._parameters if leaf in module._parameters else module._buffers
    tensor = slots[leaf]
    assert tensor is not None
    empty = torch.empty_like(tensor, device="meta")
    slots[leaf] = nn.Parameter(empty, requires_grad=False) if leaf in module._parameters else empty
    return tensor.detach()
