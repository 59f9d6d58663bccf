"""A cell of the quality study: one run of `expertune.finetune` in a folder that is thrown away, and what it gave."""

import io
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from torch import Tensor

import expertune
from benchmarks.quality_study.losses import window_losses
from benchmarks.quality_study.models import EMBEDDED
from benchmarks.quality_study.sixteen_bit import ROUTE, frozen_weights_in_16_bits
from benchmarks.quality_study.tasks import Task
from benchmarks.quality_study.variants import Variant
from expertune.config import TaskConfig
from expertune.data import prepare_examples, settled
from expertune.evaluation.scoring import score_task

BATCH = 16


def run_file(task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """The run that every variant changes something of."""
    return {
        "model": str(EMBEDDED),
        "data": {"format": "prompt-completion", "max_length": 256, **task.data},
        "lora": {"r": 16, "alpha": 32, "targets": ["attention", "experts", "lm_head"]},
        "training": {
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 32,
            "num_train_epochs": 1,
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "eval_on_start": True,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
        },
        "output_dir": str(folder),
    }


def run_cell(variant: Variant, task: Task, seed: int, other_text: Tensor) -> dict[str, Any]:
    """Train one variant on one task.

    Args:
        variant: what it changes in `run_file`.
        task: the task.
        seed: of the adapter's start and the order of the examples.
        other_text: windows of token ids, for what is forgotten.

    Returns:
        Losses and score, and what the run took.

    Raises:
        ExpertuneError: the run file is refused, or the run failed.
    """
    started = time.monotonic()
    with (
        TemporaryDirectory(prefix="quality-") as scratch,
        frozen_weights_in_16_bits() if variant.in_16_bits else nullcontext(),
    ):
        config = run_file(task, seed, Path(scratch) / "run")
        config["training"]["eval_on_start"] = variant.starts_elsewhere
        run = expertune.finetune(config, variant.overrides, console=Console(file=io.StringIO()))
        record, data = run.record, settled(run.config.data, run.record["data"]["eval"])
        examples = prepare_examples(data, "eval", run.tokenizer).examples
        scored = score_task(run.model, run.tokenizer, examples, TaskConfig(**task.task))
        forgetting = statistics.fmean(window_losses(run.model, other_text))
        run.close()
    losses, steps = dict(record["eval"]["loss"]), record["train"]["steps"]
    return {
        "loss_at_start": losses.get(0),
        "loss": losses[steps],
        "score": scored[task.figure],
        "other_text_loss": forgetting,
        "trained_parameters": record["plan"]["parameters"]["trainable"],
        "seconds_per_step": statistics.median(seconds for _, seconds in record["train"]["seconds"]),
        "seconds": round(time.monotonic() - started, 2),
    }


def tuned_model(task: Task, folder: Path) -> Path:
    """The embedded model after a longer training on a task over 16-bit weights, as one 16-bit model."""
    with frozen_weights_in_16_bits():
        config = run_file(task, 1, folder.with_name("tuning"))
        config["data"]["train"] = config["data"]["train"].replace("[0:512]", "[0:2048]")
        expertune.finetune(config, [ROUTE], console=Console(file=io.StringIO())).close()
    expertune.export(folder.with_name("tuning"), "merged", out=folder, base="source", verify=False)
    return folder
