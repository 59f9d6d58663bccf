"""What of a model is held in 4 bits, and how: the loader, `quantize` and the plan all read it here.

Experts and the linear layers of the decoder are. What stays unquantized is small or decides much: routers, embeddings,
norms, the output head. What a checkpoint has packed already keeps its bytes wherever they can be multiplied.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from expertune.checkpoint.formats import bnb4bit, mxfp4, nf4_folder
from expertune.checkpoint.formats.interface import Format, Piece
from expertune.checkpoint.formats.nf4_folder import ABSMAX
from expertune.checkpoint.linears import decoder_layers, is_linear
from expertune.checkpoint.mixed import split_linears
from expertune.checkpoint.names import NameMap
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts.contract import ExpertsSpec, require_experts
from expertune.experts.router import router_blocks
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Scheme

if TYPE_CHECKING:
    from expertune.checkpoint.moments import Moments

FORMATS: tuple[Format, ...] = (bnb4bit, mxfp4)
"""What packed weights may be read from, beside an NF4 folder."""


@dataclass(frozen=True)
class Recipe:
    """How a model's frozen weights are held.

    Attributes:
        scheme: what the experts' codes stand for; linears are NF4 in either case.
        double_quantization: whether scales are held in 8 bits.
        linears: the 4-bit linears by live name.
        whole: linears that would be 4-bit too and stay as they are, because the run file says so.
        pieces: the weights of the source, and what packed each.
        requantizes: whether packed experts that cannot stay as they are may be quantized again.
        fit: how scales were chosen, or are.
        importance: what they are chosen by where they are calibrated.
        layers: `quantization.layers`, by which `whole` was chosen.
    """

    scheme: Scheme = "nf4"
    double_quantization: bool = True
    linears: Mapping[str, nn.Linear] = field(default_factory=dict)
    whole: Mapping[str, nn.Linear] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()
    requantizes: bool = False
    fit: str = ABSMAX
    importance: "Moments | None" = None
    layers: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What an NF4 folder says of it."""
        said: dict[str, Any] = {
            "scheme": self.scheme,
            "double_quantization": self.double_quantization,
            "block_size": BLOCK_SIZE,
        }
        said |= {} if self.fit == ABSMAX else {"fit": self.fit}
        return said | ({"layers": dict(self.layers)} if self.layers else {})

    @property
    def bytes_per_weight(self) -> float:
        """Of an NF4 weight with its share of the scales."""
        per_block = 1 + 4 / NESTED_BLOCK_SIZE if self.double_quantization else 4
        return 0.5 + per_block / BLOCK_SIZE


def read_recipe(
    model: PreTrainedModel, names: NameMap, keys: Iterable[str], asked: QuantizationConfig, where: object
) -> Recipe:
    """The recipe of a checkpoint that is no NF4 folder.

    Args:
        model: its model on the meta device, before experts are swapped.
        names: its name map.
        keys: names of its tensors on disk.
        asked: what the run file says.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor without the one that belongs to it, or an NF4 folder without its manifest.
        ConfigError: the run file asks for other scales than packed weights have.
        UnsupportedModelError: packed in a way that cannot be read.
    """
    keys = list(keys)
    packed_by = _find_format(model, keys, where)
    if packed_by is not None and asked.fit != ABSMAX:
        raise ConfigError(
            f"quantization.fit is {asked.fit}, but {where} is in 4 bits already, and no other scales can be chosen for "
            "it; remove the key, or give the 16-bit checkpoint"
        )
    pieces = find_pieces(keys, packed_by)
    kept = packed_by.kept(pieces, model, names) if packed_by else None
    linears: Mapping[str, nn.Linear]
    linears, whole = split_linears(linears_to_quantize(model, names.specs), model, names, asked.layers)
    scheme: Scheme = "nf4"
    if kept is not None and kept.linears is not None:
        if asked.layers:
            raise ConfigError(
                f"quantization.layers is set, but {where} has its linears in 4 bits already; remove the key, or give "
                "the 16-bit checkpoint"
            )
        linears = kept.linears
    if kept is not None and kept.scheme is not None and asked.scheme == "auto":
        scheme = kept.scheme
    double_quantization = asked.double_quantization
    if kept is not None and kept.double_quantization is not None:
        double_quantization = kept.double_quantization
        _require_agreement(asked, scheme, double_quantization, where)
    return Recipe(
        scheme,
        double_quantization,
        linears,
        whole,
        pieces,
        requantizes=asked.scheme != "auto",
        fit=asked.fit,
        layers=asked.layers,
    )


def recipe_of_folder(
    folder: nf4_folder.Nf4Folder, model: nn.Module, names: NameMap, asked: QuantizationConfig
) -> Recipe:
    """The recipe of an NF4 folder, which its manifest and its headers say.

    Raises:
        ConfigError: the run file asks for another one.
    """
    _require_agreement(asked, folder.scheme, folder.double_quantization, folder.folder)
    if "fit" in asked.model_fields_set and asked.fit != folder.fit:
        raise ConfigError(
            f"quantization.fit is {asked.fit}, but {folder.folder} was quantized with {folder.fit}; remove the key, or "
            "quantize the source again"
        )
    packed = set(folder.linears)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in found.items() if name in packed}
    whole = {name: found[name] for name in linears_to_quantize(model, names.specs) if name not in packed}
    if asked.layers:
        wanted, _ = split_linears(linears | whole, model, names, asked.layers)
        if wanted.keys() != packed:
            other = sorted(wanted.keys() ^ packed)[0]
            raise ConfigError(
                f"quantization.layers: {folder.folder} has {names.on_disk(other)} in {4 if other in packed else 16} "
                "bits; remove the key, or quantize the source again with it"
            )
    return Recipe(folder.scheme, folder.double_quantization, linears, whole, fit=folder.fit)


def linears_to_quantize(model: nn.Module, specs: Mapping[str, ExpertsSpec] | None = None) -> dict[str, nn.Linear]:
    """Linear layers of the decoder layers that become 4-bit, by dotted name in model order.

    A linear stays as it is when it belongs to a router, is the output head, or has an input width that is no multiple
    of the quantization block: one scale would then cover the end of one output feature and the start of the next.

    Args:
        model: a causal language model; the meta device is enough.
        specs: its experts modules; needed where they have already been swapped, read from the model otherwise.

    Raises:
        UnsupportedModelError: `specs` was not given and the model has no experts that can be packed.
    """
    specs = require_experts(model) if specs is None else specs
    routers = router_blocks(model, specs)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for layer_name, layer in decoder_layers(model, specs)
        for name, module in layer.named_modules(prefix=layer_name)
        if is_linear(module)
        and module is not head
        and module.in_features % BLOCK_SIZE == 0
        and not any(name == router or name.startswith(f"{router}.") for router in routers)
    }


def find_pieces(keys: Sequence[str], packed_by: Format | None) -> list[Piece]:
    """Group a checkpoint's tensors into weights, in the order of their names' first appearance.

    Raises:
        CheckpointError: a tensor without the one that belongs to it.
    """
    packed = packed_by.parts_of(keys) if packed_by else {}
    owner = {key: name for name, parts in packed.items() for key in parts.values()}
    pieces: dict[str, Piece] = {}
    for key in keys:
        name = owner.get(key, key)
        if name not in pieces:
            pieces[name] = Piece(name, packed[name], packed_by) if name in packed else Piece(key, {"weight": key})
    return list(pieces.values())


def _find_format(model: PreTrainedModel, keys: Sequence[str], where: object) -> Format | None:
    """What packed a checkpoint, by the `quantization_config` of its config; None where nothing has.

    Where the config says nothing, names of tensors may: of weights that were packed in a live model and saved with it.
    """
    section = getattr(model.config, "quantization_config", None)
    config = section if section is None or isinstance(section, dict) else section.to_dict()
    if config is not None and config.get("quant_method") == nf4_folder.METHOD:
        raise CheckpointError(
            f"{where}: an NF4 folder that has lost its {nf4_folder.FOLDER_MARK}; copy the whole folder again"
        )
    found = next((each for each in FORMATS if each.recognizes(config, keys)), None)
    if config is None:
        return found
    what = found.unreadable(config) if found else config.get("quant_method") or "of an unknown method"
    if what is None:
        return found
    raise UnsupportedModelError(
        f"{where}: the checkpoint is already quantized ({what}), which cannot be read: give the 16-bit one, or one in "
        "bitsandbytes' nf4 or in mxfp4"
    )


def _require_agreement(asked: QuantizationConfig, scheme: Scheme, double_quantization: bool, where: object) -> None:
    """Refuse a run file that sets other values than weights have that are quantized already."""
    if "double_quantization" in asked.model_fields_set and asked.double_quantization != double_quantization:
        raise ConfigError(
            f"quantization.double_quantization is {str(asked.double_quantization).lower()}, but {where} "
            f"{'was quantized with it' if double_quantization else 'gives float32 scales'}; remove the key, or give "
            "the 16-bit checkpoint"
        )
    if asked.scheme != "auto" and asked.scheme != scheme:
        raise ConfigError(
            f"quantization.scheme is {asked.scheme}, but {where} holds {scheme}; remove the key, or quantize the "
            "source again"
        )
