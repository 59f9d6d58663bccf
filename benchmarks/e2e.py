"""A whole run, from the first import to the adapter on disk, beside the tutorial's own libraries on the same rows.

Ours is `expertune train`: plan, data check, quantizing the experts, preflight check, steps, report. The tutorial's is
its transformers Trainer, rows padded one by one (tests/legacy/legacy_train.py). Both start from one adapter and see the
same rows in the same order, without dropout; the loss of every step has to agree.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import report
from benchmarks.peers.processes import ROOT, interpreter
from benchmarks.workload import DOLLY_SAMPLE, ROW_TOKENS, Lora, Shape, describe, prepare, write_tokenizer
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig
from expertune.data import prepare_examples

_ACCUMULATION = 4  # the recipe's
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 1024, "intermediate": 3584, "layers": 2, "experts": 8, "top-k": 2, "steps": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    report.add_dtype_argument(parser)
    parser.add_argument("--peer-dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as ours")
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument("--cache", type=Path, help="where weights are made once; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: the losses of a step differ.
    """
    shape, lora = Shape(args.hidden, args.intermediate, args.layers, args.experts, args.top_k), Lora(dropout=0.0)
    dtype = report.resolve_dtype(args.dtype, "cpu")
    peer_dtype = dtype if args.peer_dtype == "auto" else getattr(torch, args.peer_dtype)
    cache = args.cache or Path(tempfile.gettempdir()) / "expertune-bench"
    workload = prepare(shape, lora, ROW_TOKENS, args.text, cache)
    write_tokenizer(workload.model)
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours(Path(folder), workload.model, workload.adapter, args, report.name_of(dtype))
        theirs = _tutorial(Path(folder), workload.model, workload.adapter, args, report.name_of(peer_dtype))
    off = max(abs(one - other) for one, other in zip(ours["losses"], theirs["losses"], strict=True))
    if off > max(_TOLERANCE[dtype], _TOLERANCE[peer_dtype]):
        raise report.CorrectnessError(f"the loss of a step is off by {off:.4f}: {ours['losses']}, {theirs['losses']}")
    result = {
        "benchmark": "e2e",
        "dtype": report.name_of(dtype),
        "steps": args.steps,
        "rows": args.steps * _ACCUMULATION,
        "ours": ours,
        "peers": {"tutorial": theirs | {"dtype": report.name_of(peer_dtype)}},
        "ratio": theirs["seconds"] / ours["seconds"],
        "largest_loss_difference": off,
        "model": describe(shape, lora),
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [
        [name, f"{each['seconds']:.1f}", _gigabytes(each["peak_bytes"]), f"{each['losses'][-1]:.4f}"]
        for name, each in (("ours", ours), ("tutorial's libraries", theirs))
    ]
    title = f"{args.steps} optimizer steps of {_ACCUMULATION} rows, whole run, {result['dtype']}, on {result['device']}"
    notes = [f"the tutorial's libraries take {result['ratio']:.1f} times as long; losses within {off:.1e}"]
    report.show(title, ["", "seconds", "peak GB", "last loss"], rows, notes)
    return result


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def _training(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": _ACCUMULATION,
        "max_steps": args.steps,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "seed": 0,
    }


def _data(args: argparse.Namespace) -> dict[str, Any]:
    source = f"{args.text}[0:{args.steps * _ACCUMULATION}]"
    return {"train": source, "template": "dolly-tutorial", "max_length": ROW_TOKENS, "train_on": "all"}


def _ours(folder: Path, model: Path, adapter: Path, args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    config = {
        "model": str(model),
        "data": _data(args),
        "quantization": {"compute_dtype": dtype},
        "lora": {"init_from": str(adapter)},
        "training": _training(args)
        | {"gradient_checkpointing": True, "train_sampling_strategy": "sequential", "save_strategy": "no"},
        "output_dir": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    measured = _timed([sys.executable, "-m", "expertune", "train", str(path)])
    record = json.loads((folder / "run" / "record.json").read_text(encoding="utf-8"))
    return measured | {
        "losses": [loss for _, loss in record["train"]["loss"]],
        "tokens_per_second": record["throughput"]["tokens_per_second"],
        "kernels": record["kernels"],
    }


def _tutorial(folder: Path, model: Path, adapter: Path, args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    rows = prepare_examples(DataConfig(**_data(args)), "train", load_tokenizer(model)).examples
    job = {
        "model": str(model),
        "adapter": str(adapter),
        "rows": [{"input_ids": row.input_ids, "labels": row.labels} for row in rows],
        "max_length": ROW_TOKENS,
        "compute_dtype": dtype,
        "skip_modules": ["lm_head", "gate"],
        "training": _training(args) | {"output_dir": str(folder / "legacy")},
        "output": str(folder / "losses.json"),
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = ROOT / "tests" / "legacy" / "legacy_train.py"
    measured = _timed([str(interpreter("legacy")), str(script), str(folder / "job.json")])
    return measured | json.loads((folder / "losses.json").read_text(encoding="utf-8"))


def _timed(command: Sequence[str]) -> dict[str, Any]:
    """Wall seconds and peak resident bytes of a process; no bytes where they may be those of this one.

    On Linux a process begins with the peak of the one that started it, and this one may have made the model's weights.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            output.seek(0)
            raise RuntimeError(f"{command[0]} ended with code {code}:\n{output.read()[-3000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    is_own = usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * scale if is_own else None}
