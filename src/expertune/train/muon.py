"""Muon for stacked factors: torch.optim.Muon's update for each expert's matrix at once, and AdamW for what is none.

`torch.optim.Muon` takes matrices. A factor of an expert layer is a batch of them, [E, r, in] or [E, out, r], and each
is made orthogonal by itself: an expert's update is the one that it would have alone. Arithmetic, constants and names of
settings are those of torch 2.11 to 2.13, in bfloat16 as there; `tests/train/test_muon.py` compares the two.

Shape suffixes: E experts, r rank.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from expertune.checkpoint.linears import is_linear
from expertune.errors import ConfigError
from expertune.train.optimizers import NOTHING_FOR_MUON, MuonSettings

_FACTORS = ("lora_A", "lora_B")

# Of the polynomial, as in Keller Jordan's post and in torch.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7


_AS_TORCH = MuonSettings()


class StackedMuon(Optimizer):
    """Muon on the groups that say `muon`, matrices or batches of them in the last two dimensions; AdamW on others.

    Args:
        groups: parameter groups, with `muon`.
        lr: learning rate of groups that have none.
        settings: of Muon.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        groups: Any,
        lr: float,
        settings: MuonSettings = _AS_TORCH,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "muon": False, "betas": betas, "eps": eps, **asdict(settings)}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def allocate(self) -> None:
        """Allocate the states that the first update would."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, group["muon"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter, group["muon"]) for parameter in trained]
            if group["muon"]:
                for parameter, state in zip(trained, states, strict=True):
                    _update(parameter, state["momentum_buffer"], group)
            elif trained:
                _update_by_adamw(trained, states, group)
        return loss

    def _state_of(self, parameter: nn.Parameter, is_muon: bool) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            if is_muon:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def orthogonalized(matrices: Tensor, steps: int) -> Tensor:
    """Matrices [..., rows, columns] with their singular values brought near to one, in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:]).bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def _update(parameter: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    momentum.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    update = orthogonalized(update, group["ns_steps"])
    rows, columns = parameter.shape[-2:]
    if group["adjust_lr_fn"] == "original":
        ratio = math.sqrt(max(1, rows / columns))
    else:
        ratio = 0.2 * math.sqrt(max(rows, columns))
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"] * ratio)


def _update_by_adamw(parameters: list[Any], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def muon_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Factors that Muon updates: those of experts and of linears, but not of a router or of the output head.

    Raises:
        ConfigError: there are none.
    """
    from peft.tuners.lora import LoraLayer

    from expertune.experts.lora import ExpertsLora  # which imports PEFT: the plan needs names and settings alone

    base = getattr(model, "get_base_model", lambda: model)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    matrices = [
        parameter
        for module in model.modules()
        if isinstance(module, LoraLayer) and module is not head
        if isinstance(module, ExpertsLora) or is_linear(module.get_base_layer())
        for name in _FACTORS
        for parameter in getattr(module, name).parameters()
        if parameter.requires_grad
    ]
    if not matrices:
        raise ConfigError(NOTHING_FOR_MUON)
    return matrices
