"""Output heads for cross entropy in chunks, and what they are compared with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.kernels.linear_cross_entropy import HeadUpdate, linear_cross_entropy, reference

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Half a unit in the last place of 8 and 11 bits, a few times over: rows, logit gradients and results are rounded.
TOLERANCES = {
    torch.float32: FLOAT32,
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    updates: list[HeadUpdate]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "hidden_TD": self.hidden,
            "weight_VD": self.weight,
            "labels_T": self.labels,
            "bias_V": self.bias,
            "updates": self.updates,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    @property
    def leaves(self) -> list[Tensor]:
        factors = [factor for update in self.updates for factor in (update.a_rD, update.b_Vr)]
        own = [update.x_TD for update in self.updates if update.x_TD is not None]
        return [self.hidden, *factors, *own]


def make_case(
    rows: int = 23,
    vocabulary: int = 157,
    width: int = 33,
    ranks: Sequence[int] = (4,),
    labeled: float = 0.6,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    own_x: bool = False,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Case:
    """Logits of a few units, random labels, every factor of a size that matters."""
    weight_dtype = weight_dtype or dtype
    labels = torch.randint(0, vocabulary, (rows,))
    labels[torch.rand(rows) >= labeled] = -100
    updates = [
        HeadUpdate(
            (torch.randn(rank, width) / width**0.5).to(adapter_dtype).requires_grad_(),
            (torch.randn(vocabulary, rank) / rank**0.5).to(adapter_dtype).requires_grad_(),
            scaling=0.5 + index,
            x_TD=torch.randn(rows, width).to(adapter_dtype).requires_grad_() if own_x else None,
        )
        for index, rank in enumerate(ranks)
    ]
    return Case(
        torch.randn(rows, width).to(dtype).requires_grad_(),
        (2 * torch.randn(vocabulary, width) / width**0.5).to(weight_dtype),
        labels,
        torch.randn(vocabulary).to(weight_dtype) if bias else None,
        updates,
        scale,
        softcap,
    )


def assert_same_as_plain(case: Case, tolerance: dict[str, float] = FLOAT32) -> None:
    loss = linear_cross_entropy(**case.arguments)
    expected = reference.linear_cross_entropy(**case.arguments)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])
    gradients = torch.autograd.grad(loss * 0.25, case.leaves)
    plain = torch.autograd.grad(expected * 0.25, case.leaves)
    for leaf, gradient, exact in zip(case.leaves, gradients, plain, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.float(), exact.float(), **tolerance)
