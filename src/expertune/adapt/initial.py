"""Factors that begin as something of their own matrix: the correction of what quantizing it lost, or its components.

- `loftq` (Li et al. 2023, one iteration): B A is the nearest matrix of rank r to W - Q(W), by its singular values. The
  4-bit bytes stay plain NF4; further iterations would quantize W - B A again, and so change them.
- `qera` (Zhang et al. 2024, QERA-approx): the same with each input feature weighted by the root of its mean square in a
  sample, so that the error of the layer's output is what gets smallest, and not that of the weight.
- `pissa` (Meng et al. 2024): B A is the nearest matrix of rank r to Q(W) itself, with the roots of its singular values
  in A and in B alike. The paper goes on with W - B A as the base; here the base stays what it is, and these first
  factors are taken away from what the adapter gives (`expertune.adapt.first_factors`): the same function, and the same
  gradients. They are those of the 4-bit matrix, of which the base computes with what is taken away; so that an NF4
  folder has them as well as the checkpoint that it was made of.

The update is scale * B @ A, so that the scale is divided out. How the product of a correction is shared out between A
and B is free: the rows of A get the length that they have in an adapter that starts from zero, and B the rest, so that
training takes the steps that its learning rate was chosen for.

Shape suffixes: N out_features, K in_features, r rank.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expertune.adapt.amounts import EXACT_SIDE, EXTRA_COLUMNS
from expertune.adapt.live import LiveAdapter, LivePair
from expertune.checkpoint.moments import Moments, Place
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.errors import CheckpointError
from expertune.experts.lora import ExpertsLora
from expertune.kernels.nf4 import dequantize
from expertune.layers.nf4_linear import Nf4Linear

# Of the subspace that holds a matrix's largest singular values.
_ITERATIONS = 3

# Length of a row of A that starts as PEFT's does: uniform in +-1 / sqrt(K).
_ROW_LENGTH = 1 / math.sqrt(3)


@dataclass
class Corrected:
    """What has been corrected so far: squared errors of 4-bit weights, with the sample's weights where there is one.

    Attributes:
        count: matrices.
        weight: squared weights.
        before: squared errors of the 4-bit weights.
        after: the same with the adapter.
    """

    count: int = 0
    weight: float = 0.0
    before: float = 0.0
    after: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Relative errors."""
        weight = self.weight or 1.0
        return {"matrices": self.count, "error_before": self.before / weight, "error_after": self.after / weight}


@dataclass
class Correction:
    """Sets the factors of an adapter as the matrices of its base come by.

    Args:
        model: the transformers model with the adapter attached.
        names: its name map.
        seed: of the subspaces; with a matrix's name it decides its factors, whatever the order.
        importance: mean squares of the input features [K] of a matrix; None means that all count the same.
        adapter: the adapter's name.
    """

    model: nn.Module
    names: NameMap
    seed: int
    importance: Moments | None = None
    adapter: str = "default"
    experts: Corrected = field(default_factory=Corrected)
    linears: Corrected = field(default_factory=Corrected)

    def __post_init__(self) -> None:
        self._pairs = {pair.name: pair for pair in LiveAdapter(self.model, self.names, self.adapter).pairs()}

    @torch.no_grad()
    def take(self, place: Place, matrix_NK: Tensor) -> None:
        """Set the factors of one matrix, where it has any."""
        name = place.on_disk(self.names)
        pair = self._pairs.get(name)
        if pair is None:
            return
        device = pair.a.device
        error = matrix_NK.to(device, torch.float32)
        total = self.linears if place.projection is None else self.experts
        root = None
        if self.importance is not None:
            root = self.importance.of(place, matrix_NK.shape[1], name).to(device).sqrt()
        squares = _squares(error if root is None else error * root)
        error = error - _held(self.model, pair)
        if root is not None:
            error *= root
        a, b = low_rank(error, len(pair.a), _generator(self.seed, name))
        total.count += 1
        total.weight += squares
        total.before += _squares(error)
        total.after += _squares(error.addmm_(b, a, alpha=-1))
        if root is not None:
            a = a / root
        lengths = a.norm(dim=1) / _ROW_LENGTH
        pair.a[: len(a)] = a / lengths[:, None].clamp_min(1e-30)
        pair.b[:, : len(a)] = b * lengths / pair.scale

    def to_json(self) -> dict[str, Any]:
        """What was found, for the record."""
        return {"experts": self.experts.to_json(), "linears": self.linears.to_json()}


@torch.no_grad()
def begin_at_components(
    model: nn.Module,
    names: NameMap,
    seed: int,
    adapter: str = "default",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Set an adapter's factors to the principal components of their matrices, which is then what is taken away.

    Args:
        model: the transformers model with an adapter whose first factors are taken away.
        names: its name map.
        seed: of the subspaces; with a matrix's name it decides its factors.
        adapter: the adapter's name.
        progress: called with the matrices that are done, and all of them.

    Returns:
        For the record, of `experts` and `linears`: `matrices`, and the `share` of their squared weights in the factors.
    """
    pairs = [pair for pair in LiveAdapter(model, names, adapter).pairs() if pair.first is not None]
    counts, squares, taken = ({"experts": 0.0, "linears": 0.0} for _ in range(3))
    for number, pair in enumerate(pairs):
        progress(number, len(pairs))
        matrix = _held(model, pair)
        a, b = low_rank(matrix, len(pair.a), _generator(seed, pair.name))
        what = "linears" if pair.projection is None else "experts"
        counts[what] += 1
        squares[what] += _squares(matrix)
        taken[what] += _squares(b)  # A's rows are orthonormal
        values = b.norm(dim=0)
        roots = (values / pair.scale).sqrt()
        pair.a[: len(a)] = a * roots[:, None]
        pair.b[:, : len(a)] = b * (roots / values.clamp_min(1e-30))
        _keep_first(pair)
    progress(len(pairs), len(pairs))
    return {
        what: {"matrices": int(count), "share": taken[what] / (squares[what] or 1.0)} for what, count in counts.items()
    }


def write_first_factors(path: Path, model: nn.Module, names: NameMap, adapter: str = "default") -> None:
    """Write what is taken away from what an adapter gives: A and B by name on disk, of the adapter's dtype."""
    found = []
    for pair in LiveAdapter(model, names, adapter).pairs():
        for name, factor in zip("AB", pair.first or (), strict=False):
            shape = tuple(factor.shape)
            found.append(Outgoing(f"{pair.name}.lora_{name}", factor.dtype, shape, lambda held=factor: held))  # type: ignore[misc]
    write_tensors(path, found)


@torch.no_grad()
def read_first_factors(path: Path, model: nn.Module, names: NameMap, adapter: str = "default") -> None:
    """Have an adapter be as it began: its factors, and what is taken away.

    Raises:
        CheckpointError: the file is damaged, or another adapter's.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    pairs = [pair for pair in LiveAdapter(model, names, adapter).pairs() if pair.first is not None]
    for pair in pairs:
        found = [tensors.get(f"{pair.name}.lora_{name}") for name in "AB"]
        if any(each is None or each.shape != own.shape for each, own in zip(found, (pair.a, pair.b), strict=True)):
            raise CheckpointError(f"{path}: does not hold the first factors of {pair.name}; it is of another run")
    for pair in pairs:
        pair.a.copy_(tensors[f"{pair.name}.lora_A"])
        pair.b.copy_(tensors[f"{pair.name}.lora_B"])
        _keep_first(pair)


def _keep_first(pair: LivePair) -> None:
    """Have a pair's factors, as they are, be those that are taken away."""
    assert pair.first is not None
    for first, factor in zip(pair.first, (pair.a, pair.b), strict=True):
        first.copy_(factor)


def _held(model: nn.Module, pair: LivePair) -> Tensor:
    """A pair's matrix as the base has it, float32."""
    layer, device = model.get_submodule(pair.module), pair.a.device
    if isinstance(layer, ExpertsLora):
        assert pair.projection is not None
        assert pair.expert is not None
        return layer.base_layer.dequantize(pair.expert, pair.projection, torch.float32).to(device)
    linear = layer.get_base_layer()  # type: ignore[operator]
    if not isinstance(linear, Nf4Linear):
        return linear.weight.to(device, torch.float32)
    shape = linear.out_features, linear.in_features
    return dequantize(linear.nf4_bytes(), 0, torch.empty(shape, dtype=torch.float32, device=device))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def low_rank(matrix_NK: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, K] of orthogonal rows and B [N, r], whose product is the nearest of rank r; r is at most N and K.

    Args:
        matrix_NK: float32.
        rank: r.
        generator: on the CPU; draws the subspace of a large matrix.
    """
    rank = min(rank, *matrix_NK.shape)
    if min(matrix_NK.shape) <= EXACT_SIDE:
        u, values, v = torch.linalg.svd(matrix_NK, full_matrices=False)
        return v[:rank], u[:, :rank] * values[:rank]
    drawn = torch.randn(matrix_NK.shape[1], rank + EXTRA_COLUMNS, generator=generator).to(matrix_NK.device)
    basis = torch.linalg.qr(matrix_NK @ drawn).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix_NK @ torch.linalg.qr(matrix_NK.mT @ basis).Q).Q
    u, values, v = torch.linalg.svd(basis.mT @ matrix_NK, full_matrices=False)
    return v[:rank], (basis @ u)[:, :rank] * values[:rank]


def _squares(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2
