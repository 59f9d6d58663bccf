"""What the inputs of 4-bit matrices are like: the mean square of each input feature, over a sample of text.

An error in a weight counts by what it is multiplied with. One forward over a few thousand tokens gives that, in the
memory of a forward, for all linears and for each expert by the tokens that are sent to it. The figures are small (19 MB
for 32 layers of 8 experts of hidden 4096) and are kept in a file, from which a base with the same bytes is made again.

Shape suffixes: T tokens, K input features, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.names import NameMap
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.errors import CheckpointError
from expertune.experts.module import Nf4Experts
from expertune.layers.nf4_linear import Nf4Linear
from expertune.storage import hash_file

# An expert that few tokens were sent to has the mean of its layer mixed in, as if it were so many tokens.
_PRIOR_TOKENS = 32

# No input feature counts less than this share of the mean: one that is zero in a sample need not always be.
_LEAST_SHARE = 1e-3


class Place(NamedTuple):
    """Whose matrix it is.

    Attributes:
        module: live name of a linear, or of an experts module.
        projection: of an experts module `gate`, `up` or `down`; None for a linear.
        expert: its number; None for a linear.
    """

    module: str
    projection: str | None = None
    expert: int | None = None

    def on_disk(self, names: NameMap) -> str:
        """The name that the checkpoint has for it, without `.weight`."""
        if self.projection is None or self.expert is None:
            return names.on_disk(self.module)
        return names.expert_on_disk(self.module, self.expert, self.projection)


@dataclass(frozen=True)
class Moments:
    """Mean squares of the inputs of matrices.

    Attributes:
        tensors: float32 [K] by live name of a linear; float32 [E, K] by the name of an experts module and `.gate_up` or
            `.down`.
        sha256: of the file that they were read from; None where there was none.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    sha256: str | None = None

    def save(self, path: Path) -> None:
        """Write the file, beside itself and then renamed."""
        write_tensors(
            path,
            [
                Outgoing(name, tensor.dtype, tuple(tensor.shape), partial(_itself, tensor))
                for name, tensor in sorted(self.tensors.items())
            ],
        )

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Read the file.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: this calibration cannot be read ({error}); it is written by a run with "
                "quantization.fit: calibrated or lora.init: qera, and belongs to that run's model"
            ) from None
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not (tensor.isfinite() & (tensor > 0)).all():
                raise CheckpointError(f"{path}: damaged: {name} holds what is no mean of squares")
        return cls(tensors, hash_file(path).sha256)

    def of(self, place: Place, in_features: int, where: object) -> Tensor:
        """The figures of a matrix, held to its shape.

        Raises:
            CheckpointError: the calibration is another model's.
        """
        key = place.module if place.expert is None else f"{place.module}.{_stack(place.projection)}"
        found = self.tensors.get(key, torch.empty(0))
        if place.expert is not None:
            found = found[place.expert] if place.expert < len(found) else torch.empty(0)
        if found.shape != (in_features,):
            raise CheckpointError(
                f"{where}: the calibration has {tuple(found.shape)} figures for {place.module}, whose input has "
                f"{in_features} features: it is another model's; calibrate again"
            )
        return found


def _stack(projection: str | None) -> str:
    return "down" if projection == "down" else "gate_up"


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def collect_moments(
    model: PreTrainedModel, batches: Iterable[dict[str, Any]], progress: Callable[[int], None] = lambda _: None
) -> Moments:
    """Pass a sample through a loaded model, and take the mean squares of its matrices' inputs.

    Args:
        model: a causal language model with 4-bit experts, without adapters.
        batches: `input_ids` [1, T], and whatever else the model is given.
        progress: called with the tokens that have passed.
    """
    sums: dict[str, _Sum] = {}
    was_training, done = model.training, 0
    base = model.get_submodule(model.base_model_prefix) if model.base_model_prefix else model
    model.eval()
    try:
        with _watched(model, sums):
            for batch in batches:
                # Logits are not needed: everything of interest lies below the head.
                base(**batch, use_cache=False)
                done += batch["input_ids"].numel()
                progress(done)
    finally:
        model.train(was_training)
    return Moments({name: each.mean() for name, each in sums.items()})


@dataclass
class _Sum:
    """Squares of inputs, float64 [E, K], and tokens [E]; of a linear one row."""

    squares: Tensor
    tokens: Tensor
    is_stack: bool

    @classmethod
    def of(cls, rows: int, width: int, is_stack: bool) -> "_Sum":
        """Of nothing yet."""
        zeros = torch.zeros(rows, width, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        return cls(*zeros, is_stack)

    def add(self, row: int, x_TK: Tensor) -> None:
        # In float32 a feature that is far beyond the others stays exact enough; the sum of sums is in float64.
        self.squares[row] += x_TK.float().square().sum(dim=0).double().cpu()
        self.tokens[row] += len(x_TK)

    def mean(self) -> Tensor:
        """Float32, of the shape of the `tensors` of `Moments`."""
        squares, tokens = self.squares, self.tokens[:, None]
        # Where nothing passed, such as in experts for images, all features count alike.
        of_layer = squares.sum(dim=0) / tokens.sum() if tokens.any() else torch.ones_like(squares[0])
        mean = (squares + _PRIOR_TOKENS * of_layer) / (tokens + _PRIOR_TOKENS)
        least = _LEAST_SHARE * mean.mean(dim=1, keepdim=True).clamp_min(1e-30)
        mean = torch.maximum(mean, least).float()
        return mean if self.is_stack else mean[0]


@contextmanager
def _watched(model: nn.Module, sums: dict[str, _Sum]) -> Iterator[None]:
    """Add the inputs of all 4-bit modules up while the block runs."""

    def linear(name: str, module: Nf4Linear, args: tuple[Any, ...]) -> None:
        sums[name].add(0, args[0].reshape(-1, module.in_features))

    def experts(name: str, module: Nf4Experts, args: tuple[Any, ...]) -> None:
        hidden_TK, index = args[:2]
        gate_up, down = sums[f"{name}.gate_up"], sums[f"{name}.down"]
        for expert in module.owned:
            x_TK = hidden_TK[(index == expert).any(dim=1)].float()
            if len(x_TK):
                gate_up.add(expert, x_TK)
                down.add(expert, _between(module, expert, x_TK))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear | Nf4Experts):
            if isinstance(module, Nf4Linear):
                hook, sums[name] = linear, _Sum.of(1, module.in_features, is_stack=False)
            else:
                hook, count, spec = experts, module.num_experts, module.spec
                sums[f"{name}.gate_up"] = _Sum.of(count, spec.hidden_size, is_stack=True)
                sums[f"{name}.down"] = _Sum.of(count, spec.intermediate_size, is_stack=True)
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name, hook=hook: hook(name, m, args)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _between(module: Nf4Experts, expert: int, x_TK: Tensor) -> Tensor:
    """What an expert's down projection is given, float32; the operator keeps it to itself."""
    parts = []
    for projection in module.spec.projections[:-1]:
        matrix = module.dequantize(expert, projection, torch.float32).to(x_TK.device)
        parts.append(x_TK @ matrix.T)
    row = torch.cat(parts, dim=1)
    if module.biases is not None:
        row += module.biases[0][expert - module.owned.start].float()
    return module.layer.activation.function(row)
