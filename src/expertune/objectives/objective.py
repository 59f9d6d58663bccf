"""What a trainer asks of an objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from expertune.data.split import Batch
from expertune.objectives.figures import Figures


class Objective(Protocol):
    """What is minimized.

    Attributes:
        figures: what is known of the step beside its loss.
    """

    figures: Figures

    def num_items(self, batches: Sequence[Batch]) -> int | None:
        """What the loss of a step is the mean over, in these micro-batches; None leaves it to transformers."""

    def loss(
        self, inputs: Mapping[str, Any], num_items_in_batch: Any, own: Callable[[], Any], with_outputs: bool = False
    ) -> Any:
        """A micro-batch's share of the step's loss.

        Args:
            inputs: the micro-batch or a part of it, without its examples' ids.
            num_items_in_batch: what `num_items` counted for the step.
            own: transformers' loss of the micro-batch.
            with_outputs: the model's outputs are wanted as well.
        """

    def why_indivisible(self, num_items_in_batch: Any) -> str | None:
        """Why a micro-batch in parts would be another step, or None; see `expertune.train.promises.Promises`."""

    def stand_by(self) -> None:
        """Take part in what the loss of other ranks' micro-batches asks of this one, which has no example for one."""
