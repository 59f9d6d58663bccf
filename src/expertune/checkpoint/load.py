"""Load a model with 4-bit experts: swap on the meta device, then stream the shards, one matrix at a time.

At no moment is there a fused 16-bit stack of experts or a whole 16-bit model: what is resident is the 4-bit model so
far, its 16-bit rest (embeddings, router, norms, lm_head), and the one tensor being read.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from expertune.attention import attend_by_row
from expertune.checkpoint.convert import Sources, parts_of
from expertune.checkpoint.linears import linears_to_quantize
from expertune.checkpoint.names import Destination, NameMap, read_names
from expertune.checkpoint.prequantized import (
    Method,
    Piece,
    double_quantization_of,
    find_pieces,
    method_of,
    place_piece,
    scheme_of,
)
from expertune.checkpoint.reader import CheckpointIndex, TensorEntry, open_checkpoint
from expertune.checkpoint.restore import ReadExperts, fill, kept_dtype, missing_tensors, settings_of
from expertune.checkpoint.store import Nf4Folder, is_nf4_folder, read_nf4_folder
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.contract import find_experts
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Scheme
from expertune.nf4_linear import Nf4Linear

Progress = Callable[[int, int], None]

_QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class LoadedModel:
    """A model whose experts are NF4.

    Attributes:
        model: the transformers model; every experts module is an `Nf4Experts`, every decoder linear a `Linear4bit`.
        names: both directions between checkpoint names and live names.
        unexpected: names of checkpoint tensors that the model has no place for.
    """

    model: PreTrainedModel
    names: NameMap
    unexpected: list[str] = field(default_factory=list)


def build_meta_model(folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's config.json describes, with parameters on the meta device and real buffers.

    Raises:
        ConfigError: no config.json, or transformers cannot build a causal language model from it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json here; is it a model folder?")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False), _LargeTensorsOnMeta():
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'}: transformers cannot build this model: {reason}") from None


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]:
    """What builds a config's model: a causal language model, or one that can take more than text where that is all."""
    known = (AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping)
    if type(config) in known[1] and type(config) not in known[0] and not hasattr(config, "auto_map"):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Make large tensors on the meta device at once.

    `init_empty_weights` lets a module allocate a parameter and moves it then: 30 GB for one layer of experts of the
    largest families, which a machine may refuse. Small ones stay real, because buffers are computed from them.
    """

    _factories = (torch.empty, torch.zeros, torch.ones)
    _large = 2**26

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._factories and "device" not in kwargs:
            sizes = args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= self._large:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def load_model(
    folder: str | Path,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    read_experts: ReadExperts | None = None,
    on_host: Collection[str] = (),
) -> LoadedModel:
    """Load a model folder with NF4 experts and NF4 decoder linears onto a device.

    Args:
        folder: config.json and safetensors, per-expert or fused, in any number of shards; 16-bit, in bitsandbytes'
            nf4, in MXFP4, or an NF4 folder.
        quantization: how frozen weights are held; what is quantized already stays as it is.
        dtype: dtype of the 16-bit rest and of all products.
        device: where everything lives.
        trust_remote_code: run Python that ships with the model.
        progress: called with (bytes read, bytes in all) after each tensor.
        read_experts: of an NF4 folder, what gives an experts module its bytes (see `expertune.checkpoint.restore`).
        on_host: of another folder, experts modules whose bytes stay in the host's memory.

    Raises:
        CheckpointError: a tensor is missing, stored twice, truncated, of another shape, or not finite; names it.
        ConfigError, UnsupportedModelError: see `build_meta_model`, `read_names` and `settings_of`.
    """
    if is_nf4_folder(folder):
        return _load_nf4_folder(
            read_nf4_folder(folder), quantization, dtype, device, trust_remote_code, progress, read_experts
        )
    index = open_checkpoint(folder)
    model = build_meta_model(folder, dtype, trust_remote_code)
    method = quantization_method(index.folder, model)
    attend_by_row(model)
    names = read_names(model)
    pieces = find_pieces(index.tensors, method)
    stored = double_quantization_of(pieces, names)
    if stored is not None:
        quantization = settings_of(quantization, stored, index.folder)
    # Which linears of a bitsandbytes checkpoint are 4-bit is as in its file.
    linears = set() if method == "bitsandbytes" else set(linears_to_quantize(model))
    swap_experts(model, quantization, device, on_host, scheme_of(pieces, names, quantization))
    loader = Loader(model, names, linears, quantization, dtype, torch.device(device))
    unexpected = loader.stream(index, pieces, progress)
    model.tie_weights()
    loader.check_complete(index.folder)
    return _finish(model, names, unexpected, device)


def _load_nf4_folder(
    stored: Nf4Folder,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool,
    progress: Progress | None,
    read_experts: ReadExperts | None,
) -> LoadedModel:
    settings = settings_of(quantization, stored.settings.double_quantization, stored.folder, stored.scheme)
    model = build_meta_model(stored.folder, dtype, trust_remote_code)
    attend_by_row(model)
    names = read_names(model)
    swap_experts(model, settings, "meta", scheme=stored.scheme)
    unexpected = fill(model, stored, dtype, torch.device(device), read_experts, progress)
    model.tie_weights()
    missing = missing_tensors(model, stored)
    if missing:
        raise CheckpointError(f"{stored.folder}: missing tensors: {_first(missing)}; quantize the model again")
    return _finish(model, names, unexpected, device)


def _finish(model: PreTrainedModel, names: NameMap, unexpected: list[str], device: torch.device | str) -> LoadedModel:
    if getattr(model.config, "quantization_config", None) is not None:
        # It said how the file was packed; transformers would take the model for one of that kind.
        del model.config.quantization_config
    model.to(device)
    model.requires_grad_(False)
    # PEFT reads this flag to adapt `Linear4bit` layers as 4-bit ones.
    model.is_loaded_in_4bit = True
    model.eval()
    return LoadedModel(model, names, unexpected)


def quantization_method(folder: Path, model: PreTrainedModel) -> Method | None:
    """How the checkpoint of a meta model is quantized, by its config; None where it is not.

    Raises:
        UnsupportedModelError: in a way that cannot be read.
    """
    scheme = getattr(model.config, "quantization_config", None)
    return method_of(scheme if scheme is None or isinstance(scheme, dict) else scheme.to_dict(), str(folder))


def swap_experts(
    model: nn.Module,
    quantization: QuantizationConfig,
    device: torch.device | str,
    on_host: Collection[str] = (),
    scheme: Scheme = "nf4",
) -> None:
    """Put an `Nf4Experts` without bytes in the place of every experts module; those on the host are to stay there."""
    for name, experts in list(find_experts(model)):
        parent, _, child = name.rpartition(".")
        stays = name in on_host
        swapped = Nf4Experts(experts, name, quantization.double_quantization, "cpu" if stays else device, scheme)
        swapped.gate_up.stays = swapped.down.stays = stays
        setattr(model.get_submodule(parent), child, swapped)


class Loader:
    """Places checkpoint tensors in a model whose experts have been swapped."""

    def __init__(
        self,
        model: PreTrainedModel,
        names: NameMap,
        linears: set[str],
        quantization: QuantizationConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.names, self.linears = model, names, linears
        self.quantization, self.dtype, self.device = quantization, dtype, device
        # What a family keeps in float32 whatever the dtype, such as a router's correction bias: name part -> dtype.
        self.kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self.filled: dict[tuple[str, str | None, int | None], str] = {}
        self._waiting: dict[str, Sources] = {}

    def stream(self, index: CheckpointIndex, pieces: list[Piece], progress: Progress | None) -> list[str]:
        """Place all weights; returns the names of those that the model has no place for."""
        done, total, unexpected = 0, index.nbytes, []
        for piece in pieces:
            entries = {part: index.tensors[key] for part, key in piece.parts.items()}
            if not place_piece(self, piece, entries):
                unexpected.append(piece.key)
            done += sum(entry.nbytes for entry in entries.values())
            if progress:
                progress(done, total)
        return unexpected + self.place_converted()

    def place(self, entry: TensorEntry, destination: Destination) -> bool:
        """Place one tensor; False where the model has no place for it.

        One that transformers converts together with others waits for `place_converted`.
        """
        if destination.converter is not None:
            self._waiting.setdefault(destination.name, []).append((entry, destination))
        elif destination.projection is not None:
            self._place_expert(entry, destination)
        else:
            return self._place(entry, destination.name)
        return True

    def place_converted(self) -> list[str]:
        """Place what is made of the tensors that have been waiting; names of those the model has no place for."""
        waiting, self._waiting = self._waiting, {}
        return [key for sources in waiting.values() for key in self._place_converted(sources)]

    def check_complete(self, folder: Path, belongs: Callable[[str], bool] = lambda name: True) -> None:
        """Raise CheckpointError naming the first tensors that nothing filled, of those whose live names belong."""
        missing = [
            self.names.expert_on_disk(module, expert, projection) + ".weight"
            for module, spec in self.names.specs.items()
            for projection in spec.projections
            for expert in range(spec.num_experts)
            if belongs(module) and (module, projection, expert) not in self.filled
        ]
        missing += [self.names.on_disk(name) for name in self._unfilled() if belongs(name)]
        if missing:
            raise CheckpointError(f"{folder}: missing tensors: {_first(missing)}")

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
        experts = self.model.get_submodule(destination.name)
        spec = self.names.specs[destination.name]
        assert isinstance(experts, Nf4Experts)
        assert destination.projection is not None
        if destination.expert is not None:
            self._write(experts, entry, destination.name, destination.expert, destination.projection, entry.read)
            return
        if len(entry.shape) != 3 or entry.shape[0] != spec.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} has shape {entry.shape}, expected {spec.num_experts} experts first"
            )
        weight = spec.weight_names[destination.projection == "down"]
        for expert in range(spec.num_experts):
            for part, projection in enumerate(layout.fused_projections(spec, weight)):

                def read(expert: int = expert, part: int = part) -> Tensor:
                    return layout.to_matrices(spec, weight, entry.read_part(expert))[part].contiguous()

                self._write(experts, entry, destination.name, expert, projection, read)

    def _place_converted(self, sources: Sources) -> list[str]:
        """Place what transformers' own operations make of several tensors; names of those it has no place for."""
        first = sources[0][0]
        unexpected: set[str] = set()
        for part in parts_of(sources, self.names):
            for name, tensor in part.convert(self.model):
                weight = self.names.weight_of(name)
                if weight is not None:
                    self._place_slices(first, *weight, part.expert, tensor)
                elif not self._place(first, name, tensor):
                    unexpected.update(entry.key for entry, _ in sources)
        return sorted(unexpected)

    def _place_slices(self, entry: TensorEntry, module: str, weight: str, first: int, live: Tensor) -> None:
        """Place the slices of a live stack, from expert `first` on."""
        experts, spec = self.model.get_submodule(module), self.names.specs[module]
        assert isinstance(experts, Nf4Experts)
        for expert, matrices in enumerate(live, start=first):
            parts = layout.to_matrices(spec, weight, matrices)
            for projection, matrix in zip(layout.fused_projections(spec, weight), parts, strict=True):
                self._write(experts, entry, module, expert, projection, matrix.contiguous)

    def _write(
        self,
        experts: Nf4Experts,
        entry: TensorEntry,
        module: str,
        expert: int,
        projection: str,
        read: Callable[[], Tensor],
    ) -> None:
        if expert >= experts.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} belongs to expert {expert}, but the model has {experts.num_experts}"
            )
        self.claim(entry, module, projection, expert)
        _require_floats(entry)
        try:
            matrix = read().to(self.device)
            # Sixteen-bit and float32 sources are quantized as they are; others, by way of float32.
            experts.write(expert, projection, matrix if matrix.dtype in _QUANTIZABLE else matrix.float())
        except ValueError as error:
            raise CheckpointError(f"{entry.shard}: tensor {entry.key}: {error}") from None

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
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} has shape {shape}, the model expects {tuple(current.shape)}"
            )
        tensor = entry.read() if converted is None else converted
        if isinstance(module, Nf4Experts):
            tensor = module.arrange(leaf, tensor)
        if leaf not in module._parameters:
            module._buffers[leaf] = tensor.to(self.device, self._dtype_of(name, current))
            return True
        tensor = tensor if tensor.dtype in _QUANTIZABLE else tensor.float()
        if not _is_finite(tensor):
            raise CheckpointError(f"{entry.shard}: tensor {entry.key} holds NaN or infinite weights")
        if module_name in self.linears and leaf == "weight":
            self._quantize_linear(module_name, tensor)
        else:
            placed = tensor.to(self.device, self._dtype_of(name, current))
            module._parameters[leaf] = nn.Parameter(placed, requires_grad=False)
        return True

    def _dtype_of(self, name: str, current: Tensor) -> torch.dtype:
        return kept_dtype(self.kept, name, current.dtype)

    def _quantize_linear(self, name: str, matrix: Tensor) -> None:
        linear = self.model.get_submodule(name)
        quantized = quantized_linear(linear, matrix, self.quantization, self.dtype, self.device)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, quantized)

    def claim(self, entry: TensorEntry, name: str, projection: str | None, expert: int | None) -> None:
        """Note what fills a weight; raise CheckpointError with both names where something else has."""
        previous = self.filled.setdefault((name, projection, expert), entry.key)
        if previous != entry.key:
            raise CheckpointError(f"{entry.shard}: tensors {previous} and {entry.key} both belong to {name}")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; in pieces, as torch makes several copies of what it is given."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(2**20))


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _require_floats(entry: TensorEntry) -> None:
    if not entry.dtype.is_floating_point:
        raise UnsupportedModelError(
            f"{entry.shard}: tensor {entry.key} is {str(entry.dtype).removeprefix('torch.')}; it looks "
            "already quantized, and config.json does not say how (quantization_config): give the 16-bit checkpoint"
        )


def quantized_linear(
    linear: nn.Module,
    matrix: Tensor,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Nf4Linear:
    """A `Linear4bit` of bitsandbytes with the NF4 bytes of `matrix`, keeping the bias of `linear`."""
    rows, columns = matrix.shape
    quantized = Nf4Linear(
        columns,
        rows,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=quantization.double_quantization,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = bnb.nn.Params4bit(
        matrix,
        requires_grad=False,
        compress_statistics=quantization.double_quantization,
        quant_type="nf4",
        blocksize=quantization.block_size,
        module=quantized,
    ).to(device)
    # bitsandbytes decodes to the source's dtype in training and to the input's in evaluation; here both are one.
    quantized.weight.quant_state.dtype = dtype
    quantized.bias = linear.bias
    # In evaluation on a CPU with AVX512-BF16, bitsandbytes would repack the weight and round its scales to bfloat16
    # for good: the first evaluation would change the frozen weights under a training run.
    quantized.support_avx512bf16_for_cpu = False
    return quantized
