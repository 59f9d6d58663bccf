"""Whole optimizer steps of full-size models in this process: seconds, memory, and where the time goes."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.campaign import floors, measure, models, shapes
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.shapes import Model
from benchmarks.workload import HERE, text_batch, token_rows
from expertune.kernels.routes import settings_of

Row = dict[str, Any]

ROWS, ACCUMULATION = 2, 4
_ALPACA = HERE / "data" / "alpaca-prompt.jinja"
_MOST_TOKENS = 1024

_WARM_UP, _STEPS = 2, 5


def mixtral(args: argparse.Namespace, out: Record, sizes: Sequence[int]) -> None:
    """Mixtral-8x7B with the recipe's adapter, on rows of real text: one item for each number of tokens."""
    rates, model = measure.rates(out), shapes.mixtral(args.small)
    if (training := models.build(out, args.out, model)) is None:
        return
    for tokens in sizes:
        item = f"step T={tokens}"

        def measured(tokens: int = tokens, item: str = item) -> Item:
            batch, rows = text_batch(tokens, args.text)
            result = timed(training, model, [models.on_device(batch, out.device)], out, item, rates)
            return result | {"rows": rows}

        out.item(item, measured, needs_s=25)


def qwen(args: argparse.Namespace, out: Record) -> None:
    """Qwen3-30B-A3B at full depth, rank 16, batch 2 x accumulation 4 on alpaca rows, merged and not."""
    rates, model = measure.rates(out), shapes.qwen3(args.small)
    rows, collate = alpaca_rows(args, out)
    if (training := models.build(out, args.out, model)) is None:
        return
    groups = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
    ways = {"one packed batch": [rows], "4 micro-batches, packed": groups}
    for name, batches in ways.items():
        item = f"ours, {model.layer.layers} layers, {name}"
        there = [models.on_device(collate(batch), out.device) for batch in batches]
        out.item(item, lambda there=there, item=item: timed(training, model, there, out, item, rates), needs_s=25)


def alpaca_rows(args: argparse.Namespace, out: Record) -> tuple[list[Row], Callable[[Sequence[Row]], Row]]:
    """The rows of one step, and what packs them."""
    rows, collate = token_rows(args.alpaca or args.text, str(_ALPACA), 48 if args.small else _MOST_TOKENS)
    rows = rows[: ROWS * ACCUMULATION]
    lengths = [len(row["input_ids"]) for row in rows]
    out.values["rows"] = {
        "tokens": lengths,
        "padded_tokens": sum(ROWS * max(lengths[first : first + ROWS]) for first in range(0, len(rows), ROWS)),
        "tokenizer": "Mixtral's: Qwen3's own is not among the files, and its ids would lie in the same range",
    }
    return rows, collate


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
