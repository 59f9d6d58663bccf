"""Auxiliary losses of routers: the load-balancing loss of the MoE families in transformers, and ST-MoE's z-loss.

Load balancing (Switch Transformer, equations 4 to 6), as `load_balancing_loss_func` of transformers' families has it: E
times the sum over experts of the share of tokens that an expert was sent, and the mean probability that the router gave
it, tokens of all layers taken together. The z-loss (ST-MoE, equation 5) is the mean square of the logits' logsumexp.

Both are means over tokens, here over those of a whole optimizer step that are no padding. Tokens per expert have no
gradient. Where those of the step are known, the loss of a part of it is linear in the part's probabilities, and the
losses of all parts sum up to the step's: see `RouterTotals`.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expertune.errors import UnsupportedModelError
from expertune.experts.load import add_tokens
from expertune.experts.module import Nf4Experts
from expertune.experts.router import find_logits

AUX_LOSS, Z_LOSS = "router_aux_loss", "router_z_loss"


@dataclass
class RouterTotals:
    """What the losses of a step need to know of all of its tokens, those of all layers taken together.

    Attributes:
        tokens: how many there are, each once in every layer.
        counts_E: how many were sent to each expert, float64 [E].
    """

    tokens: float
    counts_E: Tensor


@dataclass
class Routed:
    """What routers did with a batch.

    Attributes:
        totals: of this batch alone.
        probabilities_E: sums over its tokens, with a gradient, float32 [E].
        squares: sum of squares of the logits' logsumexp, with a gradient.
    """

    totals: RouterTotals
    probabilities_E: Tensor
    squares: Tensor


@dataclass(frozen=True)
class RouterLosses:
    """The auxiliary losses of a model's routers.

    Attributes:
        model: with 4-bit experts, adapted or not.
        aux_loss: coefficient of the load-balancing loss.
        z_loss: coefficient of the z-loss.

    Raises:
        UnsupportedModelError: a router was not found, or layers have different numbers of experts.
    """

    model: nn.Module
    aux_loss: float = 0.0
    z_loss: float = 0.0
    _routers: dict[Nf4Experts, nn.Module] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        for name, module in base.named_modules():
            if isinstance(module, Nf4Experts):
                router = find_logits(name.removesuffix(".base_layer"), base, module.spec)
                if router is None:
                    raise UnsupportedModelError(f"{name}: no router was found beside these experts; {_WITHOUT}")
                self._routers[module] = base.get_submodule(router)
        if len({experts.num_experts for experts in self._routers}) > 1:
            raise UnsupportedModelError(f"layers have different numbers of experts; {_WITHOUT}")

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the losses that are taken, by their names."""
        return {name: value for name, value in ((AUX_LOSS, self.aux_loss), (Z_LOSS, self.z_loss)) if value}

    @property
    def num_layers(self) -> int:
        """How many layers have a router."""
        return len(self._routers)

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[Routed]:
        """While open, one forward in training mode is watched; what it did is there when this is left.

        Args:
            mask: of the batch's tokens, 0 for padding; None means that there is none.
        """
        experts = next(iter(self._routers))
        device, num_experts = experts.device, experts.num_experts
        real_T = None if mask is None else mask.reshape(-1)
        totals = RouterTotals(0.0, torch.zeros(num_experts, dtype=torch.float64, device=device))
        routed = Routed(totals, torch.zeros(num_experts, device=device), torch.zeros((), device=device))
        logits: list[Tensor] = []
        hooks = [router.register_forward_hook(partial(_see, logits, num_experts)) for router in self._routers.values()]
        hooks += [each.register_forward_pre_hook(partial(_count, totals, real_T)) for each in self._routers]
        try:
            yield routed
        finally:
            for hook in hooks:
                hook.remove()
        # Not in the hooks: what they saved for backward would be missing where a layer is recomputed.
        for logits_TE in logits:
            _add(routed, logits_TE, real_T)

    def of(self, routed: Routed, step: RouterTotals) -> dict[str, Tensor]:
        """A batch's part of a step's losses, without their coefficients, by name.

        Args:
            routed: of the batch.
            step: of all batches of the step.
        """
        shares_E = (step.counts_E / step.tokens).to(routed.probabilities_E)
        balance = len(shares_E) * (shares_E * routed.probabilities_E).sum() / step.tokens
        found = {AUX_LOSS: balance, Z_LOSS: routed.squares / step.tokens}
        return {name: found[name] for name in self.coefficients}

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """What is added to the loss."""
        return torch.stack([self.coefficients[name] * loss for name, loss in losses.items()]).sum()


_WITHOUT = "set router.aux_loss: 0 in the run file, and remove router.z_loss"


def _see(logits: list[Tensor], num_experts: int, router: nn.Module, _inputs: Any, output: Any) -> None:
    if not router.training or not torch.is_grad_enabled():
        return
    outputs = output if isinstance(output, tuple | list) else (output,)
    found = next((each for each in outputs if _is_of_experts(each, num_experts)), None)
    if found is None:
        raise UnsupportedModelError(
            f"the router {type(router).__name__} hands on no logits for {num_experts} experts; {_WITHOUT}"
        )
    logits.append(found.reshape(-1, num_experts))


def _add(routed: Routed, logits_TE: Tensor, real_T: Tensor | None) -> None:
    logits_TE = logits_TE.to(routed.squares.device).float()
    probabilities_TE, squares_T = logits_TE.softmax(-1), logits_TE.logsumexp(-1).square()
    if real_T is not None:
        probabilities_TE, squares_T = probabilities_TE * real_T[:, None], squares_T * real_T
    routed.probabilities_E = routed.probabilities_E + probabilities_TE.sum(0)
    routed.squares = routed.squares + squares_T.sum()


def _is_of_experts(value: Any, num_experts: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (num_experts,)


def _count(totals: RouterTotals, real_T: Tensor | None, experts: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not experts.training:  # of a comparison that comes before the forward
        return
    index_TK = inputs[1]
    add_tokens(totals.counts_E, index_TK, None if real_T is None else real_T[:, None])
    totals.tokens += len(index_TK) if real_T is None else float(real_T.double().sum())
