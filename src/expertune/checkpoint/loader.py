"""Places a checkpoint's tensors in a model whose experts have been swapped: one matrix at a time, each checked."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.convert import Sources, convert
from expertune.checkpoint.formats.interface import Piece
from expertune.checkpoint.formats.nf4_folder import ABSMAX, CALIBRATED
from expertune.checkpoint.meta import kept_dtype
from expertune.checkpoint.moments import Place
from expertune.checkpoint.names import Destination, NameMap, first_names
from expertune.checkpoint.nf4_linears import quantized_linear
from expertune.checkpoint.reader import CheckpointIndex, Memory, TensorEntry
from expertune.checkpoint.recipe import Recipe
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError, option
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Fit

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Loader:
    """Places checkpoint tensors in a model whose experts have been swapped.

    Args:
        model: the model.
        names: its name map.
        recipe: what of it is held in 4 bits, and how.
        dtype: dtype of the unquantized rest and of all products.
        device: where everything lives.
        preserves_dtypes: leave what stays unquantized in the dtype of its source instead.

    Attributes:
        progress: called by `stream` with (bytes placed, bytes in all).

    Raises:
        ConfigError: scales are to be chosen by a calibration, and there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: NameMap,
        recipe: Recipe,
        dtype: torch.dtype,
        device: torch.device,
        preserves_dtypes: bool = False,
    ) -> None:
        self.model, self.names, self.recipe = model, names, recipe
        self.dtype, self.device, self.preserves_dtypes = dtype, device, preserves_dtypes
        self.requantizes = recipe.requantizes
        if recipe.fit == CALIBRATED and recipe.importance is None:
            raise ConfigError(
                "quantization.fit is calibrated, and there is no calibration: a run makes it of its training examples; "
                f"elsewhere give {option('calibration', 'FILE')}, the calibration.safetensors of a run of this model"
            )
        # What a family keeps in float32 whatever the dtype, such as a router's correction bias: name part -> dtype.
        self.kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self.filled: dict[tuple[str, str | None, int | None], str] = {}
        self._deferred: dict[str, Sources] = {}
        # Experts' matrices go through it, as nothing of them stays.
        self._memory = Memory()
        self.progress: Callable[[int, int], None] = lambda *_: None
        self._num_placed, self._num_bytes = 0, 0

    def stream(self, index: CheckpointIndex) -> list[str]:
        """Place all weights; returns the names of those that the model has no place for."""
        unexpected = []
        self._num_bytes = index.nbytes
        for piece in self.recipe.pieces:
            entries = {part: index.tensors[key] for part, key in piece.parts.items()}
            if not self.place_piece(piece, entries):
                unexpected.append(piece.key)
        return unexpected + self.place_converted()

    def place_piece(self, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
        """Place one weight, however it is packed; False where the model has no place for it.

        Args:
            piece: the weight.
            entries: its tensors by part.

        Raises:
            CheckpointError, UnsupportedModelError: it is damaged, or packed otherwise than can be read; names it.
        """
        if piece.format is not None:
            found = piece.format.place(self, piece, entries)
            self._count(entries.values())
            return found
        return self.place(entries["weight"], self.names.locate(piece.key))

    def place(self, entry: TensorEntry, destination: Destination) -> bool:
        """Place one tensor; False where the model has no place for it.

        One that transformers converts together with others is deferred to `place_converted`.
        """
        if destination.converter is not None:
            self._deferred.setdefault(destination.name, []).append((entry, destination))
            return True
        found = True
        if destination.projection is not None:
            self._place_expert(entry, destination)
        else:
            found = self._place(entry, destination.name)
        self._count([entry])
        return found

    def place_converted(self) -> list[str]:
        """Place what is made of the deferred tensors; names of those the model has no place for."""
        deferred, self._deferred = self._deferred, {}
        unexpected = []
        for sources in deferred.values():
            unexpected += self._place_converted(sources)
            self._count(entry for entry, _ in sources)
        return unexpected

    def _count(self, entries: Iterable[TensorEntry]) -> None:
        self._num_placed += sum(entry.nbytes for entry in entries)
        self.progress(self._num_placed, self._num_bytes)

    def check_complete(self, folder: Path, belongs: Callable[[str], bool] = lambda name: True) -> None:
        """Raise CheckpointError naming the first tensors that nothing filled, of those whose live names belong."""
        missing = [
            self.names.expert_on_disk(module, expert, projection) + ".weight"
            for module, spec in self.names.specs.items()
            if belongs(module)
            for projection in spec.projections
            for expert in self._experts(module).read_here
            if (module, projection, expert) not in self.filled
        ]
        missing += [self.names.on_disk(name) for name in self._unfilled() if belongs(name)]
        if missing:
            raise CheckpointError(f"{folder}: missing tensors: {first_names(missing)}")

    def _unfilled(self) -> list[str]:
        """Parameters that are still on the meta device, and saved buffers that kept their first values."""
        filled = {name for name, _, _ in self.filled}
        parameters = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        saved = self.model.state_dict().keys()
        experts = tuple(f"{module}." for module in self.names.specs)
        buffers = [
            name
            for name, _ in self.model.named_buffers()
            if name in saved and name not in filled and not name.startswith(experts)
        ]
        return parameters + buffers

    def _place_expert(self, entry: TensorEntry, destination: Destination) -> None:
        spec = self.names.specs[destination.name]
        assert destination.projection is not None
        if destination.expert is not None:
            if not self._is_elsewhere(destination.name, destination.expert):
                matrix = entry.read(self._memory)
                self._write(entry, destination.name, destination.expert, destination.projection, matrix)
            return
        if len(entry.shape) != 3 or entry.shape[0] != spec.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} has shape {entry.shape}, expected {spec.num_experts} experts first"
            )
        weight, here = spec.weight_names[destination.projection == "down"], self._experts(destination.name).read_here
        slices = (entry.read_part(expert, self._memory) for expert in here)
        self._place_slices(entry, destination.name, weight, here.start, slices)

    def _place_converted(self, sources: Sources) -> list[str]:
        """Place what transformers' own operations make of several tensors; names of those it has no place for."""
        first, destination = sources[0]
        unexpected: set[str] = set()
        of_experts = self.names.weight_of(destination.name)
        here = self._experts(of_experts[0]).read_here if of_experts else range(0)
        for name, expert, tensor in convert(sources, self.names, self.model, here):
            weight = self.names.weight_of(name)
            if weight is not None:
                self._place_slices(first, *weight, expert, tensor)
            elif not self._place(first, name, tensor):
                unexpected.update(entry.key for entry, _ in sources)
        return sorted(unexpected)

    def _place_slices(self, entry: TensorEntry, module: str, weight: str, first: int, live: Iterable[Tensor]) -> None:
        """Place the slices of a live stack, from expert `first` on."""
        spec = self.names.specs[module]
        for expert, matrices in enumerate(live, start=first):
            if self._is_elsewhere(module, expert):
                continue
            parts = layout.to_matrices(spec, weight, matrices)
            for projection, matrix in zip(layout.fused_projections(spec, weight), parts, strict=True):
                self._write(entry, module, expert, projection, matrix.contiguous())

    def _write(self, entry: TensorEntry, module: str, expert: int, projection: str, matrix: Tensor) -> None:
        experts = self._experts(module)
        if expert >= experts.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} belongs to expert {expert}, but the model has {experts.num_experts}"
            )
        self.claim(entry, module, projection, expert)
        _require_floats(entry)
        try:
            matrix = matrix.to(self.device)
            # Sixteen-bit and float32 sources are quantized as they are; others, by way of float32.
            matrix = matrix if matrix.dtype in FLOATS.values() else matrix.float()
            experts.write(expert, projection, matrix, self._fit(Place(module, projection, expert), entry, matrix))
        except ValueError as error:
            raise CheckpointError(f"{entry.shard}: tensor {entry.key}: {error}") from None

    def _experts(self, module: str) -> Nf4Experts:
        experts = self.model.get_submodule(module)
        assert isinstance(experts, Nf4Experts)
        return experts

    def _is_elsewhere(self, module: str, expert: int) -> bool:
        """Whether an expert of the model is on other ranks alone."""
        experts = self._experts(module)
        return expert < experts.num_experts and expert not in experts.read_here

    def _place(self, entry: TensorEntry, name: str, converted: Tensor | None = None) -> bool:
        module_name, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(module_name)
        except AttributeError:
            return False
        slots = module._parameters if leaf in module._parameters else module._buffers
        current = slots.get(leaf)
        if current is None:
            return False
        self.claim(entry, name, None, None)
        if current.is_floating_point():
            _require_floats(entry)
        shape = entry.shape if converted is None else tuple(converted.shape)
        if tuple(current.shape) != shape:
            what = f"tensor {entry.key}" if converted is None else f"{name}, made of {entry.key} and its like,"
            raise CheckpointError(f"{entry.shard}: {what} has shape {shape}, the model expects {tuple(current.shape)}")
        tensor = entry.read() if converted is None else converted
        if isinstance(module, Nf4Experts):
            tensor = module.arrange(leaf, tensor)
        if leaf not in module._parameters:
            module._buffers[leaf] = tensor.to(self.device, self.stored_dtype(name, current, entry.dtype))
            return True
        tensor = tensor if tensor.dtype in FLOATS.values() else tensor.float()
        if leaf == "weight" and (linear := self.recipe.linears.get(module_name)):
            to = self.dtype, self.device
            fit = self._fit(Place(module_name), entry, tensor)
            try:
                quantized = quantized_linear(linear, tensor, self.recipe.double_quantization, *to, fit)
            except ValueError as error:
                raise CheckpointError(f"{entry.shard}: tensor {entry.key}: {error}") from None
            self.model.set_submodule(module_name, quantized)
        elif not _is_finite(tensor):
            raise CheckpointError(f"{entry.shard}: tensor {entry.key} holds NaN or infinite weights")
        else:
            placed = tensor.to(self.device, self.stored_dtype(name, current, entry.dtype))
            module._parameters[leaf] = nn.Parameter(placed, requires_grad=False)
        return True

    def _fit(self, place: Place, entry: TensorEntry, matrix: Tensor) -> Fit | None:
        """How the scales of a matrix are chosen."""
        if self.recipe.fit == ABSMAX:
            return None
        importance = self.recipe.importance
        return Fit(None if importance is None else importance.of(place, matrix.shape[1], entry.shard))

    def stored_dtype(self, name: str, current: Tensor, source: torch.dtype) -> torch.dtype:
        """The dtype that a tensor which stays unquantized is held in."""
        if not self.preserves_dtypes:
            return kept_dtype(self.kept, name, current.dtype)
        return torch.float32 if source.is_floating_point and source not in FLOATS.values() else source

    def claim(self, entry: TensorEntry, name: str, projection: str | None, expert: int | None) -> None:
        """Note what fills a weight; raise CheckpointError with both names where something else has."""
        previous = self.filled.setdefault((name, projection, expert), entry.key)
        if previous != entry.key:
            raise CheckpointError(f"{entry.shard}: tensors {previous} and {entry.key} both belong to {name}")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; in pieces, as torch makes several copies of what it is given.

    A sum is finite only where all of its terms are, and is had at ten times the speed. One that is not may also have
    grown too large.
    """
    pieces = tensor.reshape(-1).split(2**20)
    return all(bool(piece.sum(dtype=torch.float32).isfinite() or piece.isfinite().all()) for piece in pieces)


def _require_floats(entry: TensorEntry) -> None:
    if not entry.dtype.is_floating_point:
        raise UnsupportedModelError(
            f"{entry.shard}: tensor {entry.key} is {str(entry.dtype).removeprefix('torch.')}; it looks "
            "already quantized, and config.json does not say how (quantization_config): give the 16-bit checkpoint"
        )
