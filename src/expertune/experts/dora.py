"""DoRA on experts (Liu et al. 2024): each output feature of an adapted matrix has a magnitude of its own.

y = m * (W x + s B A x) / ||W + s B A||, where the norm of each output feature is a constant to the gradient (section
4.3 of the paper), as in PEFT. The kernels scale by gain = m / norm; the norms need a pass over the frozen weights, and
are kept until a factor changes.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from expertune.experts.module import Nf4Experts
from expertune.kernels.expert_mlp.norms import row_norms
from expertune.kernels.lora import LoraUpdate

_Key = TypeVar("_Key")

# A feature whose weights are all zero gives nothing, whatever its magnitude is.
_LEAST_NORM = 1e-30


# Of the trained adapter, and of one that is kept as the reference.
_MOST_STATES = 2

_opening = threading.Lock()


class Norms:
    """Norms of the output features of an expert layer with an adapter, [E, out] for each stack of factors."""

    def __init__(self) -> None:
        # By the key of a stack, the norms of its states that were used last.
        self._known: dict[Any, dict[tuple[Any, ...], Tensor]] = {}
        # By the key of a stack, its factors' memory and its state; None while factors may change unseen.
        self._looked_at: dict[Any, tuple[Any, Any]] | None = None
        # Such blocks that are open: answers may be written in several threads at once.
        self._open = 0

    @contextmanager
    def looked_at_once(self) -> Iterator[None]:
        """While open, factors are looked at once: it is a block in which nothing trains, such as an answer's tokens.

        Looking reads all factors, for a single token as much as the experts that it is sent to. What torch notes of a
        change (its version counter) is seen here too; what it does not (`.data`, an optimizer's own kernel) is not.
        """
        with _opening:
            self._open += 1
            if self._looked_at is None:
                self._looked_at = {}
        try:
            yield
        finally:
            with _opening:
                self._open -= 1
                if not self._open:
                    self._looked_at = None

    def of(self, experts: Nf4Experts, updates: Mapping[_Key, LoraUpdate]) -> dict[_Key, Tensor]:
        """The norms of each stack, by the key that its update has here; computed for those that have changed."""
        states = {key: self._state(key, update) for key, update in updates.items()}
        known = {key: self._known.get(key, {}).get(state) for key, state in states.items()}
        if changed := [key for key, norms in known.items() if norms is None]:
            found = row_norms(experts.gate_up, experts.down, experts.layer, [updates[key] for key in changed])
            known |= dict(zip(changed, found, strict=True))
        norms_of = {key: norms for key, norms in known.items() if norms is not None}
        for key, norms in norms_of.items():
            others = [each for each in self._known.get(key, {}).items() if each[0] != states[key]]
            self._known[key] = {**dict(others[1 - _MOST_STATES :]), states[key]: norms}
        return norms_of

    def _state(self, key: Any, update: LoraUpdate) -> Any:
        """What is another one where a factor or the scale has changed."""
        memory = update.scaling, _memory(update.a), _memory(update.b)
        if self._looked_at is not None and key in self._looked_at and self._looked_at[key][0] == memory:
            return self._looked_at[key][1]
        state = update.scaling, _checksum(update.a), _checksum(update.b)
        if self._looked_at is not None:
            self._looked_at[key] = memory, state
        return state


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """What the kernels scale each output feature by; differentiable in the magnitude."""
    return magnitude.float() / norms.clamp_min(_LEAST_NORM)


@torch.no_grad()
def _checksum(factor: Tensor) -> tuple[str, int]:
    """Of a factor's bits, in their order: optimizers with kernels of their own leave no other trace of a step."""
    bits = factor.detach().view(torch.int32 if factor.element_size() == 4 else torch.int16)
    rows = bits.flatten(0, 1).sum(dim=1, dtype=torch.int64)
    weighted = rows * torch.arange(1, len(rows) + 1, device=rows.device)
    return str(factor.device), int(weighted.sum())


def _memory(factor: Tensor) -> tuple[str, int, int]:
    """Where a factor lies, and how often torch has changed it there; of inference tensors it keeps no count."""
    return str(factor.device), factor.data_ptr(), 0 if factor.is_inference() else factor._version
