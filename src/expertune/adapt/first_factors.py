"""An adapter whose first factors are taken away from what it gives: scale * (B A - B0 A0), which begins as nothing.

With it an adapter trains from factors that are not zero, as PiSSA's do, beside a base that nothing is taken out of.
What it gives has twice the rank, and that is what its files hold: an ordinary LoRA.
"""

from collections.abc import Iterator
from types import MethodType

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from expertune.experts.lora import ExpertsLora
from expertune.kernels.lora import beyond, beyond_a, beyond_b


class WithFirst(nn.Linear):
    """One factor of PEFT's adapter of a linear, which knows what it began with.

    Args:
        factor: the factor as it is now; its parameter is taken over, so that its name and its gradient stay.
    """

    first: Tensor

    def __init__(self, factor: nn.Linear) -> None:
        super().__init__(factor.in_features, factor.out_features, bias=False, device="meta")
        self.weight = factor.weight
        self.register_buffer("first", factor.weight.detach().clone(), persistent=False)


class _FactorA(WithFirst):
    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., 2r]."""
        return F.linear(input, beyond_a(self.weight, self.first))


class _FactorB(WithFirst):
    def forward(self, input: Tensor) -> Tensor:
        """[..., 2r] -> [..., out_features]."""
        return F.linear(input, beyond_b(self.weight, self.first))


def take_first_away(model: nn.Module, adapter: str = "default") -> None:
    """From here on, take the product of an adapter's factors as they are now away from what it gives.

    On experts and on linears. Routers and the output head are left as they are: what computes them takes the factors
    by themselves.

    Args:
        model: the transformers model with the adapter attached.
        adapter: the adapter's name.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for layer in list(model.modules()):
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A or layer is head:
            continue
        if isinstance(layer, ExpertsLora):
            layer.keep_first(adapter)
        elif not isinstance(layer, ParamWrapper):
            layer.lora_A[adapter] = _FactorA(layer.lora_A[adapter])
            layer.lora_B[adapter] = _FactorB(layer.lora_B[adapter])
            # What PEFT merges, and unmerges: of `weight` alone it would take the product that is not what is given.
            layer.get_delta_weight = MethodType(_delta_weight, layer)


def _delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """PEFT's method of a linear: what an adapter adds to its weight, [out_features, in_features] of B's dtype."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(a, WithFirst):
        return type(layer).get_delta_weight(layer, adapter)
    wide_a, wide_b = beyond(a.weight, b.weight, a.first, b.first)
    return (wide_b.float() @ wide_a.float() * layer.scaling[adapter]).to(b.weight.dtype)


def first_factors(model: nn.Module, adapter: str = "default") -> Iterator[tuple[Tensor, Tensor]]:
    """Each trained factor whose first one is taken away, and that one."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if isinstance(layer, ExpertsLora):
            for stack in a if adapter in layer.first else ():
                yield from zip((a[stack], b[stack]), layer.first[adapter].of(stack), strict=True)
        elif isinstance(a, WithFirst):
            yield from ((factor.weight, factor.first) for factor in (a, b))
