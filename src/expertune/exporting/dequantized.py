"""The 4-bit values that an adapter was trained beside, as 16-bit tensors under names on disk; with the adapter or not.

One decoder layer is in memory at a time, in 4 bits, loaded by what loads the model for training. Its tensors are then
dequantized one by one. Names on disk are transformers' own, by its conversion reversed.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from expertune.checkpoint.contents import layer_tensors
from expertune.checkpoint.convert import revert_all
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder, read_nf4_folder
from expertune.checkpoint.jobs import make_jobs
from expertune.checkpoint.json_file import read_config
from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.load import swap_experts
from expertune.checkpoint.loader import Loader
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.quantize import config_dtype
from expertune.checkpoint.reader import CheckpointIndex
from expertune.checkpoint.recipe import read_recipe, recipe_of_folder
from expertune.checkpoint.restore import fill
from expertune.checkpoint.writer import Outgoing
from expertune.errors import CheckpointError
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from expertune.exporting.magnitudes import scale_rows
from expertune.exporting.source import ExportSource
from expertune.kernels.nf4 import Nf4Stack


@dataclass(frozen=True)
class Part:
    """What one file of the output holds: a decoder layer, or all the rest.

    Attributes:
        layer: the layer's live name; None for the rest.
        load: places its tensors in the model.
    """

    layer: str | None
    load: Callable[[], Any]


class DequantizedModel:
    """A base model whose layers are loaded in 4 bits one after the other.

    Args:
        source: the run, with its adapter.
        is_adapted: whether the adapter is added.
        dtype: of the values; None means the base's own.
    """

    def __init__(self, source: ExportSource, is_adapted: bool = True, dtype: torch.dtype | None = None) -> None:
        self.source, self.is_adapted = source, is_adapted
        self.dtype = dtype or config_dtype(read_config(source.base.folder))
        folder, trust = source.base.folder, source.base.trust_remote_code
        self.model = build_meta_model(folder, self.dtype, trust)
        self.names = read_names(self.model)
        self.layers = [name for name, _ in decoder_layers(self.model, self.names.specs)]
        self.parts = self._parts_of_nf4() if is_nf4_folder(folder) else self._parts_of_checkpoint()

    def _parts_of_nf4(self) -> list[Part]:
        stored = read_nf4_folder(self.source.base.folder)
        asked = self.source.context.config.quantization
        swap_experts(self.model, recipe_of_folder(stored, self.model, self.names, asked), "meta")
        prefixes = tuple(f"{layer}." for layer in self.layers)

        def load(layer: str | None) -> None:
            def belongs(key: str) -> bool:
                return key.startswith(f"{layer}.") if layer else not key.startswith(prefixes)

            own = {key: entry for key, entry in stored.index.tensors.items() if belongs(key)}
            index = CheckpointIndex(stored.folder, own)
            fill(self.model, replace(stored, index=index), self.dtype, torch.device("cpu"))

        return [Part(layer, partial(load, layer)) for layer in [*self.layers, None]]

    def _parts_of_checkpoint(self) -> list[Part]:
        index, asked = self.source.index, self.source.context.config.quantization
        recipe = read_recipe(self.model, self.names, index.tensors, asked, index.folder)
        jobs = make_jobs(self.layers, self.names, recipe.pieces)
        swap_experts(self.model, recipe, "meta")
        recipe = replace(recipe, importance=self.source.importance)
        loader = Loader(self.model, self.names, recipe, self.dtype, torch.device("cpu"), preserves_dtypes=True)

        def load(layer: str | None) -> None:
            pieces = next(job.pieces for job in jobs if job.layer == layer)
            weights = [(piece, {part: index.tensors[key] for part, key in piece.parts.items()}) for piece in pieces]
            if layer is not None:
                layer_tensors(loader, layer, weights, index.folder)
                return
            for piece, entries in weights:
                loader.place_piece(piece, entries)
            loader.place_converted()

        return [Part(job.layer, partial(load, job.layer)) for job in jobs]

    @torch.no_grad()
    def tensors(self, part: Part) -> Iterator[Outgoing]:
        """What a part holds, by name on disk; an expert is dequantized when its turn comes.

        Raises:
            CheckpointError: a tensor is missing or damaged; names it.
        """
        part.load()
        self.model.tie_weights()
        plain: dict[str, Tensor] = {}
        inside, seen = tuple(f"{layer}." for layer in self.layers), set[int]()
        for name, module in self.model.named_modules():
            belongs = f"{name}.".startswith(f"{part.layer}.") if part.layer else not f"{name}.".startswith(inside)
            if not belongs or isinstance(module, Nf4Stack):
                continue
            if isinstance(module, Nf4Experts):
                yield from self._experts(name, module)
            for leaf, tensor in _saved(module):
                if id(tensor) not in seen:  # a tied weight lies on disk once
                    seen.add(id(tensor))
                    plain[f"{name}.{leaf}"] = self._plain(name, module, leaf, tensor)
        for name, tensor in revert_all(plain, self.source.model).items():
            yield Outgoing(name, tensor.dtype, tuple(tensor.shape), tensor.contiguous)

    def drop(self, part: Part) -> None:
        """Free a layer that has been written."""
        if part.layer is not None:
            self.model.set_submodule(part.layer, nn.Identity())
            gc.collect()  # modules and their parameters refer to each other

    def _plain(self, name: str, module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
        """A tensor of a module that is no stack of experts, as the family has it, with what the adapter adds."""
        if tensor.is_meta:
            raise CheckpointError(f"{self.source.base.folder}: missing tensors: {self.names.on_disk(name)}.{leaf}")
        if isinstance(module, Nf4Experts):
            spec, weight = module.spec, leaf.removesuffix("_bias")
            if weight not in spec.weight_names:
                return tensor
            parts = tensor.T.chunk(len(layout.fused_projections(spec, weight)))
            return layout.join_rows(spec, weight, parts).T
        is_packed = isinstance(module, Linear4bit) and leaf == "weight"
        values = linear_weight(module) if is_packed else tensor
        if self.is_adapted and leaf == "weight" and name in self.source.factors.linears:
            left, right = self.source.linear_update(name)
            values = values.float() + left @ right
            if (magnitude := self.source.factors.linears[name].magnitude) is not None:
                values = scale_rows(values, magnitude)
        return values.to(self.dtype if is_packed else tensor.dtype)

    def _experts(self, name: str, experts: Nf4Experts) -> Iterator[Outgoing]:
        spec = experts.spec
        for weight in spec.weight_names:
            projections = layout.fused_projections(spec, weight)
            if self._are_matrices(name, projections[0]):
                for projection in projections:
                    for expert, stem in enumerate(self.names.experts_on_disk(name, projection)):
                        read = partial(self._matrix, name, experts, expert, projection)
                        yield Outgoing(f"{stem}.weight", self.dtype, spec.shape(projection), read)
                continue
            together = [each for each in self.names.made_with(f"{name}.{weight}") if self.names.weight_of(each)]
            if together[0] != f"{name}.{weight}":
                continue  # it lies on disk with the first of them
            stacks = self.names.stack_shapes()
            empty = {live: torch.empty(stacks[live], device="meta") for live in together}
            converted = _Once(partial(self._converted, together))
            for key, tensor in revert_all(empty, self.source.model).items():
                yield Outgoing(key, self.dtype, tuple(tensor.shape), partial(converted.take, key))

    def _are_matrices(self, name: str, projection: str) -> bool:
        """Whether each expert is a tensor of its own on disk, as it is here."""
        found = self.names.locate(f"{self.names.expert_on_disk(name, 0, projection)}.weight")
        return found.converter is None and (found.name, found.projection, found.expert) == (name, projection, 0)

    def _matrix(self, name: str, experts: Nf4Experts, expert: int, projection: str) -> Tensor:
        values = experts.dequantize(expert, projection, torch.float32)
        pairs = self.source.factors.experts.get(name, {}).get(projection) if self.is_adapted else None
        if pairs is not None:
            a, b, scale, magnitude = pairs[expert]
            values = values.addmm(b.float() * scale, a.float())
            if magnitude is not None:
                values = scale_rows(values, magnitude)
        return values.to(self.dtype)

    def _converted(self, together: list[str]) -> dict[str, Tensor]:
        """Whole stacks as they lie on disk."""
        stacks: dict[str, Tensor] = {}
        for live in together:
            name, _, weight = live.rpartition(".")
            experts = self.model.get_submodule(name)
            assert isinstance(experts, Nf4Experts)
            spec = experts.spec
            stacks[live] = torch.empty(spec.stack_shape(weight), dtype=self.dtype)
            for expert, place in enumerate(stacks[live]):
                parts = [self._matrix(name, experts, expert, each) for each in layout.fused_projections(spec, weight)]
                rows = layout.join_rows(spec, weight, parts)
                place.copy_(rows.T if spec.is_transposed else rows)
        return revert_all(stacks, self.source.model)


class _Once:
    """Tensors that are made together when the first of them is asked for, and given out one by one."""

    def __init__(self, make: Callable[[], Mapping[str, Tensor]]) -> None:
        self._make, self._held = make, dict[str, Tensor]()

    def take(self, key: str) -> Tensor:
        """One of them, which is not held any longer."""
        if not self._held:
            self._held = dict(self._make())
        return self._held.pop(key)


def linear_weight(linear: Linear4bit) -> Tensor:
    """The values that the weight of a 4-bit linear stands for, float32, whatever dtype its products have."""
    state = copy.copy(linear.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(linear.weight.data, state)


def _saved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and saved buffers, by their last name."""
    tensors = {**module._parameters, **module._buffers}
    for leaf, tensor in tensors.items():
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor


def as_config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json without what says how it was packed."""
    values = read_config(source.base.folder)
    for section in [values, *(value for value in values.values() if isinstance(value, dict))]:
        section.pop("quantization_config", None)
    values.pop("torch_dtype", None)
    return values | {"dtype": str(dtype).removeprefix("torch.")}
