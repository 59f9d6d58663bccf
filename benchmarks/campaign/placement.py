"""Mixtral-8x7B with expert layers in the host's memory: steps in 8, 12, 16 and 24 GB, share of copies hidden.

Results must be byte-identical to those with all layers on the device; else nothing is timed.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.campaign import measure, models, shapes
from benchmarks.campaign.record import Item, Record
from benchmarks.report import CorrectnessError
from benchmarks.workload import text_batch
from expertune.experts.module import Nf4Experts
from expertune.placement.experts import Placement
from expertune.planning.placement import spread

BUDGETS_GB = (24, 16, 12, 8)
_ROUNDS = 3


def run(args: argparse.Namespace, out: Record) -> None:
    """One item for the copies alone, and one for each number of tokens and budget.

    Raises:
        CorrectnessError: no route passed its check, or a placement changed a result.
    """
    device = out.device
    if (training := models.build(out, args.out, shapes.mixtral(args.small))) is None:
        return
    experts = {name: module for name, module in training.model.named_modules() if isinstance(module, Nf4Experts)}
    placement = Placement(experts, device, separate_host=True)
    layer_bytes = max(module.gate_up.nbytes + module.down.nbytes for module in experts.values())
    copies = out.item("copies", lambda: _copies(next(iter(experts.values())), device))
    for tokens in (64,) if args.small else (320, 2048, 8192):
        batches = [models.on_device(text_batch(tokens, args.text)[0], device)]
        placement.move(dict.fromkeys(experts, "device"))
        resident = out.item(f"resident T={tokens}", lambda batches=batches: _steps(training, batches, device))
        if resident is None or copies is None:
            return
        for budget in BUDGETS_GB:
            waiting = _waiting(resident["peak_bytes"], budget * 10**9, layer_bytes, len(experts), args.small)
            placement.move(dict.fromkeys(experts, "device"))
            placement.move(dict.fromkeys(spread(list(experts), waiting), "host"))

            def streamed(
                budget: int = budget, waiting: int = waiting, batches: Any = batches, resident: Item = resident
            ) -> Item:
                result = _steps(training, batches, device) if waiting else dict(resident)
                if result["loss"] != resident["loss"]:
                    raise CorrectnessError(f"loss {result['loss']}, with all layers on the device {resident['loss']}")
                transfers = max(2 * waiting - 2, 0)
                alone = transfers * copies["layer_s"]
                exposed = max(result["median_s"] - resident["median_s"], 0.0)
                return result | {
                    "layers_on_host": waiting,
                    "transfers": transfers,
                    "copies_alone_s": alone,
                    "hidden_share": 1 - min(exposed / alone, 1.0) if alone else None,
                    "within_budget": result["peak_bytes"] <= budget * 10**9,
                }

            out.item(f"{budget} GB T={tokens}", streamed)


def _copies(module: Nf4Experts, device: torch.device) -> Item:
    """Seconds of one layer's bytes from the host, nothing beside it."""
    tensors = [tensor.detach().cpu() for tensor in (*module.gate_up.bytes, *module.down.bytes)]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    targets = [torch.empty_like(tensor, device=device) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)

    seconds = statistics.median(measure.seconds(copy, device) for _ in range(5))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return {"layer_bytes": nbytes, "layer_s": seconds, "gb_per_s": nbytes / seconds / 1e9}


def _steps(training: models.Training, batches: list[dict[str, Any]], device: torch.device) -> Item:
    """Median seconds of forward and backward, the same each time: nothing is updated."""
    torch.manual_seed(0)
    loss = training.forward_backward(batches)
    measure.reset_peak(device)
    seconds = [measure.seconds(lambda: training.forward_backward(batches), device) for _ in range(_ROUNDS)]
    memory = measure.memory(device)
    return {
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "tokens_per_second": sum(batch["input_ids"].numel() for batch in batches) / statistics.median(seconds),
        "loss": loss,
        "memory": memory,
        "peak_bytes": memory.get("peak_reserved", 0),
    }


def _waiting(peak_bytes: int, budget_bytes: int, layer_bytes: int, num_layers: int, small: bool) -> int:
    """Layers that have to wait so that the peak stays within the budget; two slots take room as well."""
    if small:
        return num_layers
    if peak_bytes <= budget_bytes:
        return 0
    return min(-(-(peak_bytes - budget_bytes) // layer_bytes) + 2, num_layers)
