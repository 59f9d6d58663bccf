"""What is known of a model before a weight is read: its config, and what the headers of its checkpoint say."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from expertune.checkpoint.fingerprint import Fingerprint, read_fingerprint
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder, read_nf4_folder
from expertune.checkpoint.headers import check_headers, read_headers
from expertune.checkpoint.held import Held, held_by
from expertune.checkpoint.names import NameMap, first_names
from expertune.checkpoint.reader import open_checkpoint
from expertune.checkpoint.recipe import Recipe, linears_to_quantize, read_recipe, recipe_of_folder
from expertune.config import RunConfig
from expertune.errors import ConfigError
from expertune.planning.shapes import Source


def read_source(
    config: RunConfig, folder: Path, on_hub: bool, model: PreTrainedModel, names: NameMap
) -> tuple[Recipe, Source]:
    """Read a checkpoint's headers and hold them to the model.

    Args:
        config: the run.
        folder: what `find_config` found.
        on_hub: whether it is a hub model's.
        model: the model on the meta device, with tied weights tied.
        names: its name map.

    Returns:
        What of it is held in 4 bits, and how; and the rest of what it says.

    Raises:
        CheckpointError: a damaged header, or tensors that do not belong to the config.
        ConfigError: the run file asks for other scales than the weights have.
        UnsupportedModelError: weights that are quantized in a way that cannot be read.
    """
    if is_nf4_folder(folder):
        _require_16_bits(config, "an NF4 folder")
        stored = read_nf4_folder(folder)
        recipe = recipe_of_folder(stored, model, names, config.quantization)
        return recipe, Source(holds_nf4=True, nbytes=stored.index.nbytes)
    headers = read_headers(config.model, folder, config.revision, on_hub)
    keys = headers.shapes if headers else ()
    recipe = read_recipe(model, names, keys, config.quantization, config.model if on_hub else folder)
    if any(piece.format for piece in recipe.pieces):
        _require_16_bits(config, "in 4 bits already")
    if headers is None:
        found = linears_to_quantize(model, names.specs)
        recipe = replace(recipe, linears={name: each for name, each in found.items() if name not in recipe.whole})
        note = "no weights to look at; the counts rest on config.json alone"
        return recipe, Source(saw_headers=False, notes=(note,))
    notes, saw_headers = [], None not in headers.shapes.values()
    if not saw_headers:
        notes.append("the shards were not found; tensors were checked by the names in the index alone")
    # The shape of a packed tensor is not its weight's.
    shapes = {
        piece.key: headers.shapes[piece.parts["weight"]] if piece.format is None else None for piece in recipe.pieces
    }
    if unused := check_headers(replace(headers, shapes=shapes), model, names):
        notes.append(f"tensors that the model has no place for are left out: {first_names(unused)}")
    return recipe, Source(nbytes=headers.nbytes, saw_headers=saw_headers, notes=tuple(notes))


def known_base(
    folder: Path, on_hub: bool, model: PreTrainedModel, names: NameMap, recipe: Recipe | None
) -> Fingerprint:
    """What is known of the base that a model becomes: by its config, and by such weights as lie here.

    Args:
        folder: what `find_config` found.
        on_hub: whether it is a hub model's.
        model: the model on the meta device.
        names: its name map.
        recipe: how it is held in 4 bits; None where no header was there to say it.
    """
    stored = read_nf4_folder(folder) if is_nf4_folder(folder) else None
    tensors = stored.index.tensors if stored else {}
    if not on_hub and not stored and any(folder.glob("*.safetensors")):
        tensors = open_checkpoint(folder).tensors
    held = held_by(recipe, model, names, stored.calibration if stored else None) if recipe else Held()
    return read_fingerprint(folder, tensors, model, names, held)


def _require_16_bits(config: RunConfig, found: str) -> None:
    """Refuse what is computed from 16-bit weights, where there are none."""
    if config.lora.corrects:
        raise ConfigError(
            f"lora.init: {config.lora.init} corrects what 4 bits lost, and {config.model} is {found}, where that is "
            "not to be had; give the 16-bit checkpoint as model, or remove the key"
        )
