"""What an optimizer's name under `training.optim` stands for.

transformers builds the optimizer from its name, with two parameter groups: with weight decay and without. Muon is ours,
and LoRA+ has a group for B. Here it is made, and its state is allocated before the first update; what a plan needs to
know of it is in `optimizers.py`.
"""

import inspect
from types import MethodType
from typing import Any

import torch

from expertune.train.muon import StackedMuon, muon_parameters
from expertune.train.optimizers import MuonSettings


def make_optimizer(model: Any, args: Any, loraplus_lr_ratio: float | None) -> Any:
    """The optimizer of a run where it is not the one that transformers builds; None where it is.

    Args:
        model: what is trained.
        args: TrainingArguments.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+); None means that they have the same.

    Raises:
        ConfigError: Muon has nothing to update.
    """
    if args.optim == "muon":
        return _muon(model, args, loraplus_lr_ratio or 1.0)
    if loraplus_lr_ratio is None:
        return None
    from transformers import Trainer  # with datasets and pandas

    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    # Not PEFT's groups, in which DoRA's magnitudes of linears, but not of experts, would have the rate of B.
    of_a, of_b = ([each for name, each in _trained(model) if ("lora_B" in name) is is_b] for is_b in (False, True))
    rate, weight_decay = args.learning_rate, args.weight_decay
    return optimizer(
        [
            {"params": of_a, "lr": rate, "weight_decay": weight_decay},
            {"params": of_b, "lr": rate * loraplus_lr_ratio, "weight_decay": weight_decay},
        ],
        **settings,
    )


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _muon(model: Any, args: Any, ratio: float) -> StackedMuon:
    by_muon = {id(parameter) for parameter in muon_parameters(model)}
    groups: dict[tuple[bool, bool, bool], list[Any]] = {}
    for name, parameter in _trained(model):
        kind = id(parameter) not in by_muon, "lora_B" in name, parameter.ndim == 1
        groups.setdefault(kind, []).append(parameter)
    return StackedMuon(
        [
            {
                "params": parameters,
                "muon": not by_adamw,
                "lr": args.learning_rate * (ratio if is_b else 1.0),
                "weight_decay": 0.0 if is_vector else args.weight_decay,
            }
            for (by_adamw, is_b, is_vector), parameters in sorted(groups.items(), key=lambda each: each[0])
        ],
        args.learning_rate,
        MuonSettings.parse(args.optim_args),
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
    )


def allocate_states(optimizer: Any) -> None:
    """Allocate the states that an optimizer's first update would allocate, with the values that it would give them.

    torch's optimizers do this in `_init_group` (read in torch 2.11 to 2.13), which looks at gradients' shapes alone;
    bitsandbytes' in `init_state` (read in 0.50); Muon has a method for it. Other optimizers allocate in their first
    update: transformers' Adafactor, torch's SGD with momentum, and those of further packages.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    groups = optimizer.param_groups
    new = [parameter for group in groups for parameter in group["params"] if not optimizer.state.get(parameter)]
    try:
        if isinstance(optimizer, StackedMuon):
            optimizer.allocate()
        elif hasattr(optimizer, "init_state"):
            if not optimizer.initialized:
                optimizer.check_overrides()
                optimizer.to_gpu()
                optimizer.initialized = True
            for number, group in enumerate(groups):
                for index, parameter in enumerate(group["params"]):
                    if not optimizer.state.get(parameter):
                        optimizer.init_state(group, parameter, number, index)
        elif hasattr(optimizer, "_init_group"):
            for parameter in new:
                parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
            num_lists = len(inspect.signature(optimizer._init_group).parameters) - 1
            with torch.no_grad():
                for group in groups:
                    optimizer._init_group(group, *([] for _ in range(num_lists)))
    except Exception:
        for parameter in new:
            optimizer.state.pop(parameter, None)
        raise
    finally:
        for parameter in new:
            parameter.grad = None


# The releases whose `Optimizer8bit.step` is `_step_of_bitsandbytes`, but for when it waits.
_STEP_READ_IN = "0.50."


def wait_once(optimizer: Any) -> None:
    """Have one of bitsandbytes' optimizers wait for the device once an update, and not after each tensor.

    An adapter has hundreds of tensors: the updates of 450 take 5 ms on an H100, and waiting for each of them 80 to 100.
    They follow each other on one stream all the same. Another release of bitsandbytes than the step was read in keeps
    its own.
    """
    import bitsandbytes
    from bitsandbytes.optim.optimizer import Optimizer8bit

    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Optimizer8bit) or not bitsandbytes.__version__.startswith(_STEP_READ_IN):
        return
    if inspect.unwrap(type(optimizer).step) is inspect.unwrap(Optimizer8bit.step):
        optimizer.step = MethodType(_step_of_bitsandbytes, optimizer)


@torch.optim.Optimizer.profile_hook_step
@torch.no_grad()
def _step_of_bitsandbytes(optimizer: Any, closure: Any = None) -> Any:
    from bitsandbytes.optim.optimizer import sync_gpu

    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    updated = None
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, number, index)
            optimizer.prefetch_state(parameter)
            optimizer.update_step(group, parameter, number, index)
            updated = parameter
    if updated is not None:
        sync_gpu(updated)  # paged states may be read by the host
    return loss
