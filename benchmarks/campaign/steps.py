"""Whole optimizer steps of one model in this process: seconds, memory, and where the time goes."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.campaign import floors, measure, models
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.shapes import Model
from expertune.kernels.routes import settings_of

_WARM_UP, _STEPS = 2, 5


def timed(
    training: models.Training,
    model: Model,
    batches: Sequence[dict[str, Any]],
    out: Record,
    item: str,
    rates: Item,
) -> Item:
    """Median seconds of a step, tokens per second, peak memory and share of the floor; then a profile of one step."""
    device = out.device
    real = sum(_real_tokens(batch) for batch in batches)
    kernels = settings_of(training.model)
    kernels.ran.clear()
    losses = [training.step(batches) for _ in range(_WARM_UP)]
    measure.reset_peak(device)
    seconds: list[float] = []
    parts: dict[str, list[float]] = {"forward and backward": [], "optimizer": []}
    for _ in range(2 if out.small else _STEPS):
        out.require_time()
        parts["forward and backward"].append(
            measure.seconds(lambda: losses.append(training.forward_backward(batches)), device)
        )
        parts["optimizer"].append(measure.seconds(training.update, device))
        seconds.append(parts["forward and backward"][-1] + parts["optimizer"][-1])
    median = statistics.median(seconds)
    weight_bytes = models.quantized_bytes(training.model)
    floor = floors.step_floor(model.config, model.layer, real, weight_bytes, rates)
    result: Item = {
        "tokens": real,
        "micro_batches": len(batches),
        "seconds": seconds,
        "median_s": median,
        "parts": parts,
        "tokens_per_second": real / median,
        "loss": losses,
        "memory": measure.memory(device),
        "floor": floor,
        "share_of_floor": floors.seconds(floor) / median,
        "kernels": kernels.describe(device, training.model.dtype),
        "notes": training.notes,
    }
    out.keep(item, result)
    result["profile"] = {
        "forward and backward": measure.profiled(lambda: training.forward_backward(batches), device),
        "optimizer": measure.profiled(training.update, device),
    }
    busy = [part.get("busy_s") for part in result["profile"].values()]
    # Against the time without the profiler, which slows the host.
    result["idle_share"] = measure.unmeasured() if None in busy else max(1 - sum(busy) / median, 0.0)
    result["optimizer_share"] = statistics.median(parts["optimizer"]) / median
    out.keep(item, result)
    result["synchronisations"] = measure.synchronisations(lambda: training.step(batches), device)
    return result


def _real_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def rates(out: Record) -> Item:
    """What floors are taken from, measured here."""
    found = {
        "matmul": measure.matmul_rate(out.device, torch.bfloat16, out.small),
        "copy": measure.copy_rate(out.device, out.small),
    }
    out.keep("rates", found)
    return found
