"""Muon and Adam on float32 master weights, for pre-training the embedded tiny Mixtral on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix towards one with five quintic Newton-Schulz steps."""
    wide = matrices.transpose(-1, -2) if matrices.size(-2) > matrices.size(-1) else matrices
    x: Tensor = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.transpose(-1, -2) if matrices.size(-2) > matrices.size(-1) else x


class Optimizer:
    """Muon for the matrices inside the layers, Adam for the rest, on float32 master copies.

    ``torch.optim.Muon`` takes two-dimensional parameters only; here the expert stacks are three-dimensional and all
    matrices of one shape are orthogonalised in one batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.master = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.moment = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.square = {n: torch.zeros_like(m) for n, m in self.master.items() if not self.is_matrix(n)}
        self.steps = 0
        model.to(torch.bfloat16)

    @staticmethod
    def is_matrix(name: str) -> bool:
        return "_proj" in name

    def state(self) -> dict[str, Tensor]:
        parts = {"master": self.master, "moment": self.moment, "square": self.square}
        return {f"{part}:{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            part, name = key.split(":", 1)
            getattr(self, part)[name].copy_(tensor)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])

    @torch.no_grad()
    def step(self, matrix_lr: float, other_lr: float) -> float:
        """One update; returns the gradient norm before clipping."""
        grads = {n: p.grad.float() for n, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        scale = min(1.0, 1.0 / (norm + 1e-6))
        self.steps += 1
        batches: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        for name, grad in grads.items():
            if self.is_matrix(name):
                # Muon does not depend on the gradient's size, so only Adam's share is clipped.
                moment = self.moment[name].lerp_(grad, 0.05)
                stacked = self.as_stack(name, grad.lerp(moment, 0.95))
                batches.setdefault((stacked.size(-2), stacked.size(-1)), []).append((name, stacked))
            else:
                grad = grad * scale
                self.moment[name].lerp_(grad, 0.1)
                self.square[name].lerp_(grad.square(), 0.05)
                mean = self.moment[name] / (1 - 0.9**self.steps)
                root = (self.square[name] / (1 - 0.95**self.steps)).sqrt() + 1e-10
                self.master[name].sub_(other_lr * mean / root)
        for (rows, columns), items in batches.items():
            updates = orthogonalise(torch.cat([stacked for _, stacked in items]))
            size = matrix_lr * max(1.0, rows / columns) ** 0.5
            for (name, stacked), update in zip(items, torch.split(updates, [s.size(0) for _, s in items]), strict=True):
                master = self.as_stack(name, self.master[name])
                master.mul_(1 - 0.01 * matrix_lr).sub_(size * update.float())
                assert master.shape == stacked.shape
        for parameter in self.parameters.values():
            parameter.grad = None
        self.write_back()
        return norm

    @staticmethod
    def as_stack(name: str, tensor: Tensor) -> Tensor:
        """View a weight as a stack of matrices; gate and up are two matrices of their own."""
        if name.endswith("gate_up_proj"):
            return tensor.view(tensor.size(0) * 2, tensor.size(1) // 2, tensor.size(2))
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
