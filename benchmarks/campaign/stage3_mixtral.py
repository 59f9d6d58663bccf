"""Stage 3: whole optimizer steps of Mixtral-8x7B at full size, with the recipe's adapter, on rows of real text."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.campaign import measure, models, shapes, steps
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.stage1_correctness import passed_settings
from benchmarks.workload import text_batch
from expertune.kernels.routes import KernelSettings, use_settings

LIMIT_S = 400


def run(args: argparse.Namespace, out: Record) -> None:
    """Build the model once, then one item for each number of tokens.

    Raises:
        CorrectnessError: no route passed its check.
    """
    device = out.device
    settings, out.values["routes"] = passed_settings(args.out, device)
    rates = steps.rates(out)
    model = shapes.mixtral(args.small)
    built: list[models.Training] = []
    out.item("model", lambda: _build(model, device, built, settings))
    if not built:
        return
    (training,) = built
    # The size with a memory target first of the large ones: what is missing after a cut is then the least.
    sizes = (64, 128) if args.small else (320, 2048, 8192, 1280)
    for tokens in sizes:
        item = f"step T={tokens}"

        def measured(tokens: int = tokens, item: str = item) -> Item:
            batch, rows = text_batch(tokens, args.text)
            result = steps.timed(training, model, [models.on_device(batch, device)], out, item, rates)
            return result | {"rows": rows}

        out.item(item, measured)


def _build(model: shapes.Model, device: torch.device, built: list[Any], settings: KernelSettings) -> Item:
    started = time.monotonic()
    measure.reset_peak(device)
    adapted = models.random_model(model, torch.bfloat16, device)
    use_settings(adapted, settings)
    seconds = time.monotonic() - started
    training = models.begin(adapted, Path(tempfile.mkdtemp(prefix="campaign-")), device)
    built.append(training)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {
        "config": model.config,
        "lora": vars(model.lora) | {"targets": model.targets},
        "seconds": seconds,
        "quantized_bytes": models.quantized_bytes(adapted),
        "trainable_parameters": trainable,
        "optimizer": type(training.optimizer).__name__,
        "memory": measure.memory(device),
        "notes": training.notes,
    }
