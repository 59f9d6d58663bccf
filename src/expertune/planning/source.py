"""What a model is made of before a weight is read, however its checkpoint is packed.

A 16-bit checkpoint becomes 4-bit when it is loaded; one in bitsandbytes' nf4, and an NF4 folder, keep what they have;
MXFP4 experts do too, unless the run file asks for NF4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from expertune.checkpoint.formats.interface import Piece
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder, read_nf4_folder
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.recipe import linears_to_quantize, read_recipe, recipe_of_folder
from expertune.config import RunConfig
from expertune.kernels.nf4 import Scheme
from expertune.planning.headers import Headers, check_headers, read_headers


@dataclass(frozen=True)
class Source:
    """A checkpoint as far as its headers tell.

    Attributes:
        holds_nf4: it is a folder that `expertune quantize` wrote.
        linears: the linears that will be 4-bit, by live name.
        double_quantization: how scales are held.
        scheme: how experts are held: `nf4`, or `mxfp4` where they stay as the checkpoint has them.
        nbytes: bytes of its tensors; None where nothing says.
        notes: what could not be looked at.
    """

    holds_nf4: bool
    linears: Mapping[str, nn.Linear]
    double_quantization: bool
    scheme: Scheme
    nbytes: int | None
    notes: tuple[str, ...]


def read_source(config: RunConfig, folder: Path, on_hub: bool, model: PreTrainedModel, names: NameMap) -> Source:
    """Read a checkpoint's headers and hold them to the model.

    Args:
        config: the run.
        folder: what `find_config` found.
        on_hub: whether it is a hub model's.
        model: the model on the meta device, with tied weights tied.
        names: its name map.

    Raises:
        CheckpointError: a damaged header, or tensors that do not belong to the config.
        ConfigError: the run file asks for other scales than the weights have.
        UnsupportedModelError: weights that are quantized in a way that cannot be read.
    """
    if is_nf4_folder(folder):
        stored = read_nf4_folder(folder)
        recipe = recipe_of_folder(stored, model, config.quantization)
        return Source(True, recipe.linears, recipe.double_quantization, recipe.scheme, stored.index.nbytes, ())
    headers = read_headers(config.model, folder, config.revision, on_hub)
    keys = headers.shapes if headers else ()
    recipe = read_recipe(model, names, keys, config.quantization, config.model if on_hub else folder)
    if headers is None:
        alone = "no weights to look at; the counts rest on config.json alone"
        linears = linears_to_quantize(model, names.specs)
        return Source(False, linears, recipe.double_quantization, recipe.scheme, None, (alone,))
    notes = _check(headers, recipe.pieces, model, names)
    return Source(False, recipe.linears, recipe.double_quantization, recipe.scheme, headers.nbytes, tuple(notes))


def _check(headers: Headers, pieces: Sequence[Piece], model: PreTrainedModel, names: NameMap) -> list[str]:
    notes = []
    if None in headers.shapes.values():
        notes.append("the shards were not found; tensors were checked by the names in the index alone")
    # The shape of a packed tensor is not its weight's.
    shapes = {piece.key: headers.shapes[piece.parts["weight"]] if piece.format is None else None for piece in pieces}
    unused = check_headers(replace(headers, shapes=shapes), model, names)
    if unused:
        more = f" and {len(unused) - 2} more" if len(unused) > 2 else ""
        notes.append(f"tensors that the model has no place for are left out: {', '.join(unused[:2])}{more}")
    return notes
