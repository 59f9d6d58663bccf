"""Adapters for mlx-lm, and models that it reads: names and the order of output features are asked of mlx-lm itself.

mlx-lm has a model file for each family, whose `sanitize` renames, stacks and splits what a checkpoint holds. It is
handed a checkpoint of small tensors instead: [out_features, 2], which say of each output feature to what it belongs and
which one it is. Where these end up, lora_a and lora_b go.

Read from mlx-lm 0.32.2. Shape suffixes: E experts, r rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.adapt.scales import dtype_in_file, fold
from expertune.adapt.stacks import pad
from expertune.checkpoint.convert import revert_all
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.errors import ExportError
from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec
from expertune.exporting.formats import Engine, Format, Options, Progress
from expertune.exporting.merged import FLOOR, dtypes_on_disk
from expertune.exporting.programs import run_program
from expertune.exporting.source import ExportSource, Place
from expertune.storage import SCRATCH, write_json

_PROGRAM = "mlx_runtime.py"
_REFUSED = "--to mlx: mlx-lm cannot take this"
_INSTALL = "pip install 'expertune[mlx]' (on Linux it needs glibc 2.35 or later)"


@dataclass(frozen=True)
class Home:
    """Where the factors of one linear, or of a stack of experts, go.

    Attributes:
        place: what it is here; of an experts module one projection.
        features: for each of mlx-lm's output features, which of ours it is: [out], or [E, out].
        experts: for each of mlx-lm's experts, which of ours it is; None where there are none.
    """

    place: Place
    features: Tensor
    experts: list[int] | None


class MlxAdapter(Format):
    """`mlx`: `adapters.safetensors` and `adapter_config.json`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._homes: dict[str, Home] = {}

    def require(self, source: ExportSource) -> None:
        """Refuse a family that mlx-lm does not know, and what it holds otherwise than as a linear."""
        if find_spec("mlx_lm") is None:
            raise ExportError(f"--to {self.name}: the names are mlx-lm's own, and it is not installed: {_INSTALL}")
        self._homes = find_homes(source)

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of the tensors."""
        return sum(outgoing.nbytes for outgoing in self._tensors(source))

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the adapter's two files."""
        tensors = sorted(self._tensors(source), key=lambda outgoing: outgoing.name)
        write_tensors(folder / "adapters.safetensors", tensors, {"format": "mlx"})
        # mlx-lm has one rank and one scale for all. Whole names are keys as well as names within a layer are.
        lora = {"rank": source.max_rank, "scale": source.common_scale, "dropout": 0.0, "keys": sorted(self._homes)}
        layers = source.model.config.get_text_config().num_hidden_layers
        config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": lora}
        write_json(folder / "adapter_config.json", {"model": source.context.config.model, **config})

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """mlx-lm on its CPU or its GPU, whichever it has."""
        alone = {"model": str(base)}
        return [Engine("mlx-lm", _PROGRAM, alone, {**alone, "adapter": str(folder)})]

    def _tensors(self, source: ExportSource) -> Iterator[Outgoing]:
        scale, rank = source.common_scale, source.max_rank
        for name, home in self._homes.items():
            a, b, own, _ = source.pair(home.place)
            dtype = dtype_in_file(b.dtype, own / scale)
            is_one = home.experts is None
            shape_a = (a.shape[1], rank) if is_one else (len(a), rank, a.shape[2])
            shape_b = (rank, b.shape[0]) if is_one else (*b.shape[:2], rank)
            yield Outgoing(f"{name}.lora_a", a.dtype, shape_a, partial(_lora_a, a, rank, home))
            yield Outgoing(f"{name}.lora_b", dtype, shape_b, partial(_lora_b, b, own / scale, rank, home))


class MlxMerged(MlxAdapter):
    """`mlx-merged`: base and adapter as one model under mlx-lm's own names, in the base's dtype."""

    def require(self, source: ExportSource) -> None:
        """Refuse a base in 4 bits too: its sum with an adapter is in 16."""
        if source.is_packed:
            raise ExportError(
                f"--to {self.name}: {source.base.folder} holds weights in 4 bits, and the sum with an adapter has 16: "
                "give the 16-bit model with --model, or keep the adapter apart with --to mlx"
            )
        super().require(source)

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of the tensors."""
        return sum(entry.nbytes for entry in source.index.tensors.values()) + super().nbytes(source)

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Have mlx-lm add the adapter to the base."""
        with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            super().write(source, Path(scratch), progress)
            fused = {"model": str(source.base.folder), "adapter": scratch, "to": str(folder)}
            run_program(_PROGRAM, {"fuse": fused}, Path(scratch) / "request.json", _REFUSED, source.num_weights)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """mlx-lm on its CPU or its GPU, whichever it has."""
        alone, exported, rounded = {"model": str(base)}, {"model": str(folder)}, dtypes_on_disk(source)
        return [Engine("mlx-lm", _PROGRAM, alone, exported, rounded, floor=FLOOR)]


def make(name: str, options: Options) -> MlxAdapter:
    """The format of this name."""
    return MlxMerged(name) if name == "mlx-merged" else MlxAdapter(name)


def find_homes(source: ExportSource) -> dict[str, Home]:
    """mlx-lm's name of each module that the adapter changes, and what goes there.

    Raises:
        ExportError: mlx-lm does not know the family, or holds a module in a way that takes no adapter.
    """
    owners: list[tuple[Place, int | None]] = []
    for place in source.places:
        experts = range(source.names.specs[place.module].num_experts) if place.projection else [None]
        owners += [(place, expert) for expert in experts]
    found: dict[str, Home] = {}
    for name, marks in _mapped(source, {owner: number for number, owner in enumerate(owners, 1)}).items():
        numbers, features = marks.long().unbind(-1)
        first = numbers.reshape(-1, numbers.shape[-1])[:, 0].tolist()
        if not numbers.any() or not all(first) or (numbers != numbers[..., :1]).any():
            continue
        held = [owners[number - 1] for number in first]
        (place, expert), in_order = held[0], torch.arange(features.shape[-1])
        is_alone = {each for each, _ in held} == {place} and bool((features.sort(dim=-1).values == in_order).all())
        if not name.startswith("!") and is_alone and numbers.ndim == (1 if expert is None else 2):
            found[name] = Home(place, features, [each or 0 for _, each in held] if place.projection else None)
    held_there = {home.place for home in found.values()}
    for place in source.places:
        if place in held_there:
            continue
        own = [source.names.expert_on_disk(place.module, 0, place.projection)] if place.projection else []
        raise ExportError(
            f"--to mlx: mlx-lm holds {[*own, source.names.on_disk(place.module)][0]} otherwise than as a linear of its "
            "own, or not at all, and takes no adapter on it; export the whole model with --to merged"
        )
    return found


def _mapped(source: ExportSource, numbers: Mapping[tuple[Place, int | None], int]) -> dict[str, Tensor]:
    """What mlx-lm makes of a checkpoint of small tensors, by the names of its modules."""
    with TemporaryDirectory(prefix="expertune-mlx-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        config = read_mapping(source.base.folder / "config.json")
        config.pop("quantization_config", None)
        write_json(folder / "config.json", config)
        save_file(_small_checkpoint(source, numbers), folder / "model.safetensors", {"format": "pt"})
        run_program(_PROGRAM, {"map": str(folder)}, Path(scratch) / "request.json", _REFUSED, source.num_weights)
        return load_file(Path(scratch) / "mapped.safetensors")


def _small_checkpoint(source: ExportSource, numbers: Mapping[tuple[Place, int | None], int]) -> dict[str, Tensor]:
    """The base's tensors by name on disk, its matrices as [out_features, 2]: a number from `numbers`, and which one."""
    live: dict[str, Tensor] = {}
    for name, parameter in source.model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module in source.names.specs and leaf in source.names.specs[module].weight_names:
            live[name] = _small_stack(source.names.specs[module], module, leaf, numbers)
        elif parameter.ndim == 2 and leaf == "weight":
            live[name] = _marks(numbers.get((Place(module), None), 0), parameter.shape[0])
        else:
            live[name] = torch.zeros(parameter.shape)
    try:
        disk = revert_all(live, source.model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ExportError(f"--to mlx: the names on disk of this family are not known: {error}") from None
    return dict(_as_packed(source, name, tensor) for name, tensor in disk.items())


def _small_stack(
    spec: ExpertsSpec, module: str, weight: str, numbers: Mapping[tuple[Place, int | None], int]
) -> Tensor:
    stack = []
    for expert in range(spec.num_experts):
        parts = [
            _marks(numbers.get((Place(module, projection), expert), 0), spec.shape(projection)[0])
            for projection in layout.fused_projections(spec, weight)
        ]
        joined = layout.join_rows(spec, weight, parts)
        stack.append(joined.T if spec.is_transposed else joined)
    return torch.stack(stack)


def _marks(number: int, features: int) -> Tensor:
    return torch.stack([torch.full((features,), float(number)), torch.arange(float(features))], dim=1)


def _as_packed(source: ExportSource, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Under the name of packed blocks [E, out, blocks, bytes] where the base has these, the same bits."""
    blocks = f"{name}_blocks"
    if blocks not in source.index.tensors:
        return name, tensor.contiguous()
    module, _, _ = source.names.locate(name).name.rpartition(".")
    spec = source.names.specs.get(module) or source.names.specs[source.names.locate(name).name]
    matrices = tensor.mT if spec.is_transposed else tensor
    return blocks, matrices.contiguous().view(torch.uint8).unsqueeze(-2)


def _lora_a(a: Tensor, rank: int, home: Home) -> Tensor:
    """[in, rank], or [E, rank, in] of experts."""
    return pad(a, rank, dim=0).T if home.experts is None else pad(a, rank, dim=1)[home.experts]


def _lora_b(b: Tensor, factor: float, rank: int, home: Home) -> Tensor:
    """[rank, out], or [E, out, rank] of experts."""
    if home.experts is None:
        return fold(pad(b, rank, dim=1), factor)[home.features].T
    ordered = torch.stack([b[expert][features] for expert, features in zip(home.experts, home.features, strict=True)])
    return fold(pad(ordered, rank, dim=2), factor)
