"""Tensors of an adapter file, of one module each: named, filled up and scaled, and computed as they are written."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from expertune.adapt.factors import MAGNITUDE, PREFIX, Factors
from expertune.adapt.scales import dtype_in_file, fold
from expertune.adapt.stacks import fuse, pad
from expertune.checkpoint.writer import Outgoing
from expertune.experts.contract import ExpertsSpec
from expertune.experts.layout import fused_projections


def pair_in_file(
    stem: str, a: Tensor, b: Tensor, rank: int, factor: float, magnitude: Tensor | None = None
) -> Iterator[Outgoing]:
    """A and B of one module in a file: zeros up to a rank, and a factor in B; and its magnitudes."""
    if magnitude is not None:
        yield Outgoing(f"{PREFIX}{stem}{MAGNITUDE}", magnitude.dtype, tuple(magnitude.shape), lambda: magnitude)
    yield Outgoing(f"{PREFIX}{stem}.lora_A.weight", a.dtype, (rank, a.shape[1]), lambda: pad(a, rank, dim=0))
    yield Outgoing(
        f"{PREFIX}{stem}.lora_B.weight",
        dtype_in_file(b.dtype, factor),
        (b.shape[0], rank),
        lambda: fold(pad(b, rank, dim=1), factor),
    )


def stack_in_file(
    stem: str, spec: ExpertsSpec, weight: str, held: Mapping[str, Factors], rank: int
) -> Iterator[Outgoing]:
    """A and B of a stack as PEFT holds it; a projection without an adapter has zeros.

    Args:
        stem: its name in the file.
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        held: by projection A [E, r, in], B [E, out, r], and a factor that goes into B.
        rank: of an expert in the file.
    """
    projections, some = fused_projections(spec, weight), next(iter(held.values()))
    dtypes = [dtype_in_file(pair.b.dtype, pair.scale) for pair in held.values()]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)

    def fused() -> tuple[Tensor, Tensor]:
        nothing = some.a[:, :0], some.b[:, :, :0]
        pairs = [
            (held[each].a, fold(held[each].b, held[each].scale)) if each in held else nothing for each in projections
        ]
        return fuse(spec, weight, pairs, rank)

    outputs, inputs = spec.shape(projections[0])
    shape = (spec.num_experts * rank, inputs)
    yield Outgoing(f"{PREFIX}{stem}.lora_A.weight", some.a.dtype, shape, lambda: fused()[0])
    shape = (outputs * len(projections), spec.num_experts * rank)
    yield Outgoing(f"{PREFIX}{stem}.lora_B.weight", dtype, shape, lambda: fused()[1].to(dtype))
