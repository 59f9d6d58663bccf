"""Memory that ran out: how it shows, what is freed then, and how a single operator is run again.

An operator asks for its memory before it writes, so that one which runs out has changed nothing, and running it again
is the same as running it once. That is what makes an optimizer's update and the clipping of gradients recoverable
wherever in them memory runs out, without a copy of anything. It holds for operators that write one tensor at most; of
one that writes a list of tensors it cannot be known how far it came. (None of torch's own asks for memory between two
tensors of a list, unless their dtypes are mixed.)
"""

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels import workspace
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory


def give_back(cycles: bool = True) -> None:
    """Free what a failed try has left: cycles, this thread's working memory, blocks that the CUDA allocator keeps.

    Args:
        cycles: whether to look for cycles, which takes some tenths of a second.
    """
    if cycles:
        gc.collect()
    workspace.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class RandomState:
    """Python's, numpy's and torch's generators as they are now."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Draw from here on what was drawn after this was made."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class RetriedOperators(TorchDispatchMode):
    """Inside, an operator that runs out of memory is run again by itself; what went before it stands.

    Args:
        make_room: called with what the allocator said and how often it has been called for this operator; raises where
            there is no room to be made.
    """

    def __init__(self, make_room: Callable[[str, int], None]) -> None:
        super().__init__()
        self._make_room = make_room

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in each operator's place."""
        tries = 0
        while True:
            try:
                return func(*args, **(kwargs or {}))
            except Exception as error:
                if not is_out_of_memory(error) or not _writes_one_tensor_at_most(func):
                    raise
                said = in_one_line(error)
            # Not inside the except block: there the error's traceback holds what the operator had allocated.
            self._make_room(said, tries)
            tries += 1


def _writes_one_tensor_at_most(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    written = [argument.type for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return not written or (len(written) == 1 and str(written[0]) in ("Tensor", "Optional[Tensor]"))
