"""States of an optimizer, allocated before its first update, are those that the update itself would allocate."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from expertune.train.optim import allocate_states, wait_once

optim = torch.optim


def bnb(name: str, **settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(parameters, lr=1e-2, **settings)
        return made

    return make


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: optim.AdamW(parameters, lr=1e-2),
    "adamw fused": lambda parameters: optim.AdamW(parameters, lr=1e-2, fused=True),
    "amsgrad": lambda parameters: optim.AdamW(parameters, lr=1e-2, foreach=False, amsgrad=True),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda parameters: optim.Adagrad(parameters, lr=1e-2),
    "adafactor": lambda parameters: optim.Adafactor(parameters, lr=1e-2),
    "nadam": lambda parameters: optim.NAdam(parameters, lr=1e-2),
    "rprop": lambda parameters: optim.Rprop(parameters, lr=1e-2),
    "sgd": lambda parameters: optim.SGD(parameters, lr=1e-2),
    "bitsandbytes adamw": bnb("AdamW8bit"),
    "bitsandbytes lion": bnb("Lion8bit"),
}


def start(make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*shape).to(dtype)) for shape in [(80, 64), (3, 16, 8), (5,)]]
    groups = [{"params": parameters[:2], "weight_decay": 0.01}, {"params": parameters[2:], "weight_decay": 0.0}]
    return parameters, make(groups)


def update(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()


def allocated(optimizer: torch.optim.Optimizer) -> dict[int, list[tuple[str, Any]]]:
    """Storage of each state by number of the parameter; what is no tensor is left out."""
    return {
        number: [(key, value.data_ptr()) for key, value in state.items() if isinstance(value, torch.Tensor)]
        for number, state in enumerate(optimizer.state.values())
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_after_allocation_are_those_without_it_and_allocate_no_further_state(
    name: str, dtype: torch.dtype
) -> None:
    (plain, one), (early, other) = (start(OPTIMIZERS[name], dtype) for _ in range(2))
    before = [parameter.detach().clone() for parameter in early]
    allocate_states(other)
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(early, before, strict=True))
    assert all(parameter.grad is None for parameter in early)
    held = allocated(other)
    for _ in range(2):
        for parameters, optimizer in ((plain, one), (early, other)):
            torch.manual_seed(1)
            update(parameters, optimizer)
    assert allocated(other) == held
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(plain, early, strict=True))
    for state, twin in zip(one.state.values(), other.state.values(), strict=True):
        assert state.keys() == twin.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin[key])), key


@pytest.mark.parametrize("name", ["bitsandbytes adamw", "bitsandbytes lion"])
def test_8bit_update_that_waits_once_is_bitsandbytes_own_which_waits_after_each_tensor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    (plain, stock), (ours, once) = (start(OPTIMIZERS[name], torch.float32) for _ in range(2))
    wait_once(once)
    hooked: list[Any] = []
    once.register_step_post_hook(lambda optimizer, *_: hooked.append(optimizer))
    schedulers = [optim.lr_scheduler.LinearLR(optimizer) for optimizer in (stock, once)]
    for parameters, optimizer, scheduler in ((plain, stock, schedulers[0]), (ours, once, schedulers[1])):
        monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda _, by=optimizer: waited.append(id(by)))
        torch.manual_seed(1)
        for _ in range(3):
            update(parameters, optimizer)
            scheduler.step()
    assert waited == [*3 * len(plain) * [id(stock)], *3 * [id(once)]]
    assert hooked == [once] * 3
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(plain, ours, strict=True))
    for state, twin in zip(stock.state.values(), once.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(twin[key])) for key, value in state.items())


def test_step_of_bitsandbytes_is_the_one_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, `_step_of_bitsandbytes` and the releases beside it are to be read against the library again."""
    import bitsandbytes

    source = inspect.getsource(inspect.unwrap(bitsandbytes.optim.optimizer.Optimizer8bit.step))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "1ff73e3157161684"
    _, optimizer = start(OPTIMIZERS["bitsandbytes adamw"], torch.float32)
    monkeypatch.setattr(bitsandbytes, "__version__", "0.51.0")
    wait_once(optimizer)
    assert "step" not in vars(optimizer)


def test_states_of_a_checkpoint_stay() -> None:
    parameters, optimizer = start(OPTIMIZERS["adamw"], torch.float32)
    update(parameters, optimizer)
    held, values = allocated(optimizer), optimizer.state[parameters[0]]["exp_avg"].clone()
    allocate_states(optimizer)
    assert allocated(optimizer) == held
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], values)


def test_optimizer_that_allocates_in_its_update_alone_is_left_as_it_is() -> None:
    parameters, optimizer = start(Adafactor, torch.float32)
    allocate_states(optimizer)
    assert not optimizer.state
    update(parameters, optimizer)


def test_failed_allocation_leaves_no_half_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = start(OPTIMIZERS["adamw"], torch.float32)
    adam: ModuleType = sys.modules["torch.optim.adam"]
    real, calls = torch.zeros_like, []

    def zeros_like(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(*arguments, **settings)

    monkeypatch.setattr(adam.torch, "zeros_like", zeros_like)
    with pytest.raises(torch.OutOfMemoryError):
        allocate_states(optimizer)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in parameters)
    allocate_states(optimizer)
    assert len(optimizer.state) == 3
