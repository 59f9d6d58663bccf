"""Gradients and weights that are not finite, found before they reach the adapter or a checkpoint.

One factor's gradient may hold a NaN under a finite loss, and the update would carry it into the adapter for good. The
norm over all gradients is computed at every step anyway, and is finite only where all of them are.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertune.distributed.mesh import Ranks
from expertune.errors import NonFiniteGradientError
from expertune.train.checkpoints import last_good_checkpoint

_MAX_NAMED = 3
_MAX_EXAMPLES = 8


def norm_of_gradients(model: nn.Module, norm: Tensor | float | None) -> float:
    """The norm as transformers computed it, or computed here if it was not.

    Args:
        model: the model, with the gradients of a step.
        norm: what `Trainer._get_grad_norm` returned; None where clipping is left to another library.
    """
    if norm is None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm)


def is_lowered_by_scaler(norm: float, scaler: Any) -> bool:
    """Whether float16's loss scaling handles it: it skips such a step, and halves the scale for the next."""
    return scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; one synchronization with the device."""
    named = list(tensors)
    if not named:
        return []
    finite = torch.stack([torch.isfinite(tensor.detach()).all() for _, tensor in named]).tolist()
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]


def gradients_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The gradients of a model by the names of their parameters."""
    return ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)


def gradients_among(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [each.grad for each in parameters if each.grad is not None]


def trained_weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that are trained, by name."""
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


def in_words(names: list[str]) -> str:
    """The first of some parameters' names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def bad_step(what: str, step: int, places: list[str], last_good: str) -> str:
    """What is said of a step that cannot be taken, with the examples that it was taken on."""
    more = f" and {len(places) - _MAX_EXAMPLES} more" if len(places) > _MAX_EXAMPLES else ""
    on = f" on {', '.join(places[:_MAX_EXAMPLES])}{more}" if places else ""
    return (
        f"{what} in step {step}{on}; {last_good}. Look at these examples, or start a new run with a lower "
        "training.learning_rate, if you like from this adapter by lora.init_from"
    )


def require_finite_weights(model: nn.Module, ranks: Ranks, step: int, run_dir: str | Path) -> None:
    """Refuse to keep an adapter that holds a NaN: finite gradients may still have been divided by zero.

    Args:
        model: what is trained.
        ranks: the processes of the run; of experts that are shared out each has its own, and all have to stop.
        step: the step that was taken last.
        run_dir: the run directory, for the last good checkpoint.

    Raises:
        NonFiniteGradientError: names the weights, the step and the last good checkpoint.
    """
    of_ranks = ranks.gather(not_finite(trained_weights_of(model)))
    if names := list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank)):
        raise NonFiniteGradientError(
            f"the update of step {step} left weights that are not finite ({in_words(names)}); "
            f"{last_good_checkpoint(run_dir)}. Start a new run with a lower learning_rate and the optimizer's own "
            "training.adam_epsilon"
        )
