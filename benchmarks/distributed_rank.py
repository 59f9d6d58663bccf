"""One process of a run that benchmarks/distributed.py measures: its steps, what it exchanges, its memory."""

import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, trainer

from benchmarks.timing import memory_status
from benchmarks.traffic import Counted, Traffic, loopback_bytes, sent_bytes
from expertune.api import finetune
from expertune.distributed.shares import owned_experts
from expertune.experts.lora import own_factors
from expertune.experts.module import Nf4Experts

# Of the measured rate of a collective: bytes of a tensor, and how often it is sent.
_RATE_BYTES = (2**12, 2**23)
_RATE_CALLS = 9


class Watch(TrainerCallback):
    """Takes the steps of a run: some to warm up, then those that count.

    Args:
        traffic: of the process.
        warm_steps: the first ones.
    """

    def __init__(self, traffic: Traffic, warm_steps: int) -> None:
        self.traffic, self.warm_steps = traffic, warm_steps
        self.steps: list[dict[str, Any]] = []
        self.held: dict[str, int] = {}
        self.copies = self.loopback = 0
        self.counted: Counted = {}
        self._hooks = ExitStack()
        self._started, self._first_wait = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if state.global_step == self.warm_steps:
            self.held = held_bytes(kwargs["model"])
            self._count_copies(kwargs["model"])
            self.loopback = loopback_bytes()
            self.traffic.clear()
        self._started, self._first_wait = time.perf_counter(), len(self.traffic.waits)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if state.global_step > self.warm_steps:
            seconds = time.perf_counter() - self._started
            self.steps.append({"seconds": seconds, "waits": self.traffic.waits[self._first_wait :]})
        if state.global_step == state.max_steps:
            self._hooks.close()
            self.counted = copy.deepcopy(self.traffic.counted)
            self.loopback = loopback_bytes() - self.loopback

    def _count_copies(self, model: nn.Module) -> None:
        """Count how many other ranks have experts that each token is for, by what routers say."""
        size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

        def count(experts: Nf4Experts, given: tuple[torch.Tensor, ...]) -> None:
            owners = torch.cat(
                [torch.full((len(owned_experts(experts.num_experts, size, r)),), r) for r in range(size)]
            )[given[1].long()]
            self.copies += sum(int((owners == other).any(dim=1).sum()) for other in range(size) if other != rank)

        for module in model.modules():
            if isinstance(module, Nf4Experts):
                self._hooks.callback(module.register_forward_pre_hook(count).remove)

    def result(self) -> dict[str, Any]:
        """What was seen, for JSON."""
        return {
            "steps": self.steps,
            "counted": self.counted,
            "loopback_bytes": self.loopback,
            "copies": self.copies,
            **self.held,
        }


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a process holds: of experts' weights, and of what it trains, alone or as all processes do."""
    experts = [each for each in model.modules() if isinstance(each, Nf4Experts)]
    own = sum(factor.nbytes for of_layer in own_factors(model).values() for factor in of_layer)
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    return {
        "expert_bytes": sum(each.gate_up.nbytes + each.down.nbytes for each in experts),
        "trained_bytes_own": own,
        "trained_bytes_shared": trained - own,
    }


def train(config: dict[str, Any], warm_steps: int, output: str) -> None:
    """The run, and a file of what this process saw; figures but the losses are of all steps that count."""
    before = memory_status("RssAnon")
    traffic = Traffic()
    watch = Watch(traffic, warm_steps)
    trainer.DEFAULT_CALLBACKS.append(watch)  # which every Trainer of transformers starts with
    with traffic.seen():
        series = finetune(config).record["train"]
    result = watch.result() | {
        # Libraries that a process has read from files are the same for all, and for any size.
        "peak_bytes": memory_status("VmHWM") - memory_status("RssFile") - before,
        "losses": [loss for _, loss in series["loss"]],
        "tokens": sum(int(tokens) for _, tokens in series["tokens"][warm_steps:]),
    }
    Path(output).write_text(json.dumps(result), encoding="utf-8")


def measure_rates(output: str) -> None:
    """Latency and bytes a second of each collective that a run uses, as this process sees them."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()

    def all_reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def all_gather(tensor: torch.Tensor) -> None:
        dist.all_gather(list(tensor.chunk(size)), tensor[: len(tensor) // size].clone())

    def broadcast(tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0)

    def all_to_all(tensor: torch.Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(tensor), tensor)

    rates = {each.__name__: _rate(each) for each in (all_reduce, all_gather, broadcast, all_to_all)}
    Path(output).write_text(json.dumps(rates), encoding="utf-8")
    dist.destroy_process_group()


def _rate(collective: Callable[[torch.Tensor], None]) -> dict[str, float]:
    taken, sent = [], []
    for num_bytes in _RATE_BYTES:
        tensor = torch.ones(num_bytes // 4)
        traffic = Traffic()
        with traffic.seen():
            collective(tensor)
        sent.append(sent_bytes(traffic.counted))
        seconds = []
        for _ in range(_RATE_CALLS):
            dist.barrier()
            started = time.perf_counter()
            collective(tensor)
            seconds.append(time.perf_counter() - started)
        taken.append(statistics.median(seconds))
    rate = (sent[1] - sent[0]) / max(taken[1] - taken[0], 1e-9)
    return {"bytes_per_second": rate, "seconds_per_call": max(0.0, taken[0] - sent[0] / rate)}
