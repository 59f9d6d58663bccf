"""States of an optimizer for a rank's own experts, in checkpoints that hold those of all experts.

A checkpoint is that of one process, whatever wrote it: it is resumed by any number of ranks, however the experts are
shared out. An expert's states are those elements of a tensor that lie at its place in the first dimension; bitsandbytes
also keeps one scale for each block of 256 numbers, the experts' blocks one after the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from expertune.distributed.parallel import ExpertParallel
from expertune.errors import ConfigError
from expertune.experts.module import Nf4Experts, parallel_of
from expertune.train.optimizers import why_not_by_expert


def require_states_by_expert(model: nn.Module, optimizer: str) -> None:
    """Refuse an optimizer that would take another step where experts are shared out to ranks.

    Raises:
        ConfigError: names it, and what to set.
    """
    if parallel_of(model) is None:
        return
    if reason := why_not_by_expert(optimizer, [factor[0].numel() for factor, _ in _factors(model)]):
        raise ConfigError(reason)


@contextmanager
def states_of_all(model: nn.Module, optimizer: Any, here: bool) -> Iterator[None]:
    """While open, an optimizer has the states of all experts where `here` holds, on the host; all ranks call this."""
    own: dict[nn.Parameter, dict[str, Any]] = {}
    for factor, experts in _factors(model):
        held = optimizer.state.get(factor)
        if held:
            assert experts.parallel is not None
            own[factor] = held
            gathered = _gathered(held, experts, experts.parallel, here)
            if here:
                optimizer.state[factor] = gathered
    try:
        yield
    finally:
        for factor, held in own.items():
            optimizer.state[factor] = held


def load_own_states(model: nn.Module, optimizer: Any) -> None:
    """Have an optimizer take from a checkpoint's states those of a rank's own experts."""
    experts_of = dict(_factors(model))
    if not experts_of:
        return
    load = optimizer.load_state_dict

    def load_own(state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        states = dict(state_dict["state"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in states and parameter in experts_of:
                states[number] = _own_part(states[number], experts_of[parameter])
        load({**state_dict, "state": states}, *args, **kwargs)

    optimizer.load_state_dict = load_own


def _factors(model: nn.Module) -> Iterator[tuple[nn.Parameter, Nf4Experts]]:
    from expertune.experts.lora import own_factors  # which imports PEFT

    return ((factor, experts) for experts, factors in own_factors(model).items() for factor in factors)


def _gathered(held: Mapping[str, Any], experts: Nf4Experts, parallel: ExpertParallel, here: bool) -> dict[str, Any]:
    gathered: dict[str, Any] = {}
    for key, value in held.items():
        if _is_by_expert(key, value, len(experts.owned)):
            whole = parallel.whole(value.view(len(experts.owned), -1), experts.num_experts)
            if here:
                gathered[key] = whole.view(-1, *value.shape[1:]).cpu()
        else:
            gathered[key] = value
    return gathered


def _own_part(whole: Mapping[str, Any], experts: Nf4Experts) -> dict[str, Any]:
    owned = slice(experts.owned.start, experts.owned.stop)
    own: dict[str, Any] = {}
    for key, value in whole.items():
        if isinstance(value, Mapping):  # as bitsandbytes wraps some of its states
            own[key] = _own_part(value, experts)
        elif _is_by_expert(key, value, experts.num_experts):
            part = value.view(experts.num_experts, -1)[owned]
            own[key] = part.reshape(-1, *value.shape[1:]).clone()
        else:
            own[key] = value
    return own


def _is_by_expert(key: str, value: Any, num_experts: int) -> bool:
    """Whether a state has a part for each of so many experts."""
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    return key.startswith("absmax") if value.ndim == 1 else value.shape[0] == num_experts
