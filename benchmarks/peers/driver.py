"""The loop that every driver runs: build a model once, then do on request what the runner asks for.

Requests come as JSON lines on stdin and answers go as JSON lines to stdout, so that rounds of several stacks can be
interleaved while each keeps its process, its libraries and its peak of memory to itself. Nothing but torch and
safetensors is imported here: the same file serves environments years apart.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_LEARNING_RATE = 2.5e-5
_EOS = 2  # what the tutorial pads with
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_STATUS = Path("/proc/self/status")

Batch = dict[str, Tensor]


@dataclass
class Stack:
    """A stack ready to train.

    Attributes:
        model: the adapted model; called with the batch, it returns an object with `.loss`.
        around: makes the context that the forward of a batch runs in.
        notes: how the stack had to differ from the others, for the JSON.
        packages: what else its speed depends on; their versions go into the JSON.
    """

    model: nn.Module
    around: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext()
    notes: list[str] = field(default_factory=list)
    packages: tuple[str, ...] = ()


def autocast(dtype: str) -> Callable[[Batch], AbstractContextManager[Any]]:
    """Autocast on the CPU to a dtype of half precision; nothing where products run in float32."""
    return lambda batch: torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")


def serve(build: Callable[[argparse.Namespace], Stack]) -> None:
    """Build the stack that the command line names, then answer requests until stdin closes."""
    parser = argparse.ArgumentParser()
    for name in ("model", "batch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="stacks that cannot read it begin one of their own")
    parser.add_argument("--rank", type=int, default=8, help="of an adapter that the stack begins itself")
    parser.add_argument("--alpha", type=int, default=16, help="likewise")
    parser.add_argument("--optimizer", choices=("adamw", "paged_adamw_8bit"), default="adamw")
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    parser.add_argument("--keep", action="store_true", help="ours: all expert layers keep gate and up for backward")
    parser.add_argument("--pad-to", type=int, help="one row per micro-batch, padded on the left to so many tokens")
    args = parser.parse_args()

    # Libraries print as they like; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    started = time.perf_counter()
    stack = build(args)
    stack.model.train()
    trainable = [parameter for parameter in stack.model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(args.optimizer, trainable)
    batches = _micro_batches(load_file(args.batch, device=args.device))
    if args.pad_to is not None:
        batches = [row for batch in batches for row in _padded_rows(batch, args.pad_to)]
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "check": lambda: _check(stack, trainable, batches),
        "base": lambda: {"loss": _base_loss(stack, trainable, batches)},
        "step": lambda: _step(stack, optimizer, batches, args.device),
        "memory": lambda: _memory(args.device, load_peak_bytes),
    }
    load_peak_bytes = _peak_bytes(args.device)
    _answer(
        answers,
        load_seconds=time.perf_counter() - started,
        load_peak_bytes=load_peak_bytes,
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        threads=torch.get_num_threads(),
        versions={name: importlib.metadata.version(name) for name in (*_PACKAGES, *stack.packages)},
        notes=stack.notes,
    )
    _reset_peak(args.device)
    for line in sys.stdin:
        _answer(answers, **actions[json.loads(line)["do"]]())


def _check(stack: Stack, trainable: list[Tensor], batches: list[Batch]) -> dict[str, Any]:
    """Loss and gradient norm with dropout off: what two stacks on the same bytes must agree on."""
    with _dropout_off(stack.model):
        loss = _forward_backward(stack, batches)
    squares = [parameter.grad.double().square().sum() for parameter in trainable if parameter.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    without = sum(parameter.grad is None for parameter in trainable)
    stack.model.zero_grad(set_to_none=True)
    return {"loss": loss, "gradient_norm": norm, "factors": len(trainable), "factors_without_gradient": without}


def _base_loss(stack: Stack, trainable: list[Tensor], batches: list[Batch]) -> float:
    """Loss with every factor at zero, on which stacks with the same frozen bytes agree whatever their adapters are."""
    saved = [parameter.detach().clone() for parameter in trainable]
    with torch.no_grad():
        for parameter in trainable:
            parameter.zero_()
    with _dropout_off(stack.model):
        loss = _forward_backward(stack, batches)
    stack.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, values in zip(trainable, saved, strict=True):
            parameter.copy_(values)
    return loss


def _step(stack: Stack, optimizer: torch.optim.Optimizer, batches: list[Batch], device: str) -> dict[str, Any]:
    _synchronize(device)
    started = time.perf_counter()
    loss = _forward_backward(stack, batches)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    return {"seconds": time.perf_counter() - started, "loss": loss}


def _forward_backward(stack: Stack, batches: list[Batch]) -> float:
    """Gradients of the mean loss over all label tokens, however many micro-batches they come in."""
    counts = [int((batch["labels"][..., 1:] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        with stack.around(batch):
            loss = stack.model(**batch, use_cache=False).loss * (count / sum(counts))
        loss.backward()
        total += float(loss.detach())
    return total


def _optimizer(name: str, trainable: list[Tensor]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=_LEARNING_RATE)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(trainable, lr=_LEARNING_RATE)


def _micro_batches(tensors: Batch) -> list[Batch]:
    """A file's micro-batches: its tensors are one, or several whose names begin with a number and a dot."""
    if not all(name.partition(".")[0].isdigit() for name in tensors):
        return [tensors]
    numbered: dict[int, Batch] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        numbered.setdefault(int(number), {})[key] = tensor
    return [numbered[number] for number in sorted(numbered)]


def _padded_rows(batch: Batch, length: int) -> list[Batch]:
    """Each row of a concatenated batch as a micro-batch of its own, [1, length], padded on the left."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    rows = []
    for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
        input_ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end]
        padding = (length - (end - start), 0)
        rows.append(
            {
                "input_ids": nn.functional.pad(input_ids, padding, value=_EOS),
                "labels": nn.functional.pad(labels, padding, value=-100),
                "attention_mask": nn.functional.pad(torch.ones_like(input_ids), padding, value=0),
            }
        )
    return rows


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Dropout at probability 0, in training mode: evaluation mode would switch checkpointing off as well."""
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, probability in dropouts:
            module.p = probability


def _answer(answers: Any, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _synchronize(device: str) -> None:
    """Wait for the device, whose work a clock on the host does not see."""
    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str, load_peak_bytes: int) -> dict[str, int | None]:
    """Peaks of the whole run and of what came after loading."""
    since = _peak_bytes(device)
    # Where the mark cannot be reset, it is that of the whole run.
    can_reset = device == "cuda" or _STATUS.exists()
    return {"peak_bytes": max(load_peak_bytes, since), "step_peak_bytes": since if can_reset else None}


def _peak_bytes(device: str) -> int:
    """Peak bytes since the last reset: allocated on the GPU, or resident of this process.

    On Linux not by getrusage: there a process begins with the peak of the one that started it, which may have made the
    model's weights.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak(device: str) -> None:
    """Start the high-water mark anew, so that steps can be told from loading (on a CPU: Linux only)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")
