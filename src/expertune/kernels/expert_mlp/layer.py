"""ExpertLayer: what the operator needs of an expert layer beside tensors, found by the layer's name."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from expertune.kernels.expert_mlp.plan import Activation
from expertune.kernels.operators import register
from expertune.kernels.routes import DEFAULT_SETTINGS, KernelSettings


class LayerHandle(Protocol):
    """Acquires a layer's offloaded bytes on the device that computes; see `expertune.placement.prefetch`."""

    def announce(self, backward: bool) -> None:
        """Called before a forward: whether a backward of the same tokens follows."""

    def acquire(
        self, weights: list[Tensor], backward: bool, reused: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """The tensors on the device that computes while the block runs; `weights` are the offloaded ones.

        `backward` is the direction in which the layers are passed; `reused`: the same layer is used once more next.
        """


class ExpertLayer:
    """An expert layer as its operator finds it, for as long as the object lives.

    Args:
        activation: what is between the GEMMs and after them.
        name: the layer's name in its model. Two live layers of one name are told apart by a number.
        settings: how the GEMMs run.
        handle: acquires the layer's offloaded weights; None where they stay on the device.

    Attributes:
        keeps: forward keeps what its first GEMM gave until backward, which then does not compute it again; see
            `expertune.experts.module.keep_inner`.
    """

    def __init__(
        self,
        activation: Activation,
        name: str = "experts",
        settings: KernelSettings = DEFAULT_SETTINGS,
        handle: LayerHandle | None = None,
    ) -> None:
        self.activation, self.settings, self.handle = activation, settings, handle
        self.keeps = False
        self._asked_for = name
        self.name = register(self, name)

    def __reduce__(self) -> tuple[type["ExpertLayer"], tuple[Any, ...], dict[str, bool]]:
        # A copy is found under a name of its own.
        return ExpertLayer, (self.activation, self._asked_for, self.settings, self.handle), {"keeps": self.keeps}
