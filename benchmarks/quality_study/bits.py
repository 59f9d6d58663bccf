"""What 4 bits cost a model before any training: its weights replaced by their NF4 values, part by part.

The model is stock transformers' in float32, so that nothing but the replaced weights differs. A part is one kind of
matrix in one layer; the output head is measured as well, though it stays in 16 bits by default.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.quality_study import cells, models
from benchmarks.quality_study.losses import window_losses
from benchmarks.quality_study.tasks import Task
from expertune.config import DataConfig, TaskConfig
from expertune.data import prepare_examples
from expertune.evaluation.scoring import score_task
from expertune.kernels.nf4 import Nf4Stack

KINDS = ("attention", "w1", "w2", "w3", "lm_head")


@dataclass(frozen=True)
class Part:
    """One kind of matrix in one layer; the head has none.

    Attributes:
        layer: index of the layer.
        kind: one of `KINDS`.
    """

    layer: int | None
    kind: str

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"layer {self.layer}, {self.kind}"


class Simulated:
    """A model of which each part can have its own 16-bit weights or their NF4 values.

    Args:
        folder: a 16-bit checkpoint whose experts transformers holds as `gate_up_proj` and `down_proj`.
    """

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._views: dict[Part, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            for part, view in _views(name, parameter.data):
                self._views.setdefault(part, []).append(view)
        self._whole = {part: [view.clone() for view in views] for part, views in self._views.items()}
        self._nf4 = {part: [nf4_values(view) for view in views] for part, views in self._whole.items()}
        self.parts = sorted(self._views, key=lambda part: (part.layer is None, part.layer or 0, KINDS.index(part.kind)))

    def num_weights(self, part: Part) -> int:
        """Weights of a part."""
        return sum(view.numel() for view in self._views[part])

    def error(self, part: Part) -> float:
        """Root of the squared error of NF4 over the weights' own squares."""
        pairs = list(zip(self._nf4[part], self._whole[part], strict=True))
        return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())

    def set(self, in_nf4: Iterable[Part]) -> None:
        """Give some parts their NF4 values, and all others their own weights."""
        chosen = set(in_nf4)
        for part, views in self._views.items():
            for view, value in zip(views, (self._nf4 if part in chosen else self._whole)[part], strict=True):
                view.copy_(value)


def _views(name: str, weight: Tensor) -> Iterable[tuple[Part, Tensor]]:
    """The parts that a parameter belongs to, each with its matrices as a view [M, N, K]."""
    found = re.search(r"layers\.(\d+)\.", name)
    layer = int(found[1]) if found else None
    if name.endswith(".experts.gate_up_proj"):
        half = weight.shape[1] // 2
        yield Part(layer, "w1"), weight[:, :half]
        yield Part(layer, "w3"), weight[:, half:]
    elif name.endswith(".experts.down_proj"):
        yield Part(layer, "w2"), weight
    elif name.endswith("_proj.weight") and ".self_attn." in name:
        yield Part(layer, "attention"), weight[None]
    elif name == "lm_head.weight":
        yield Part(None, "lm_head"), weight[None]


def nf4_values(matrices: Tensor) -> Tensor:
    """What a stack of matrices [M, N, K] is in NF4 with double quantization."""
    stack = Nf4Stack(*matrices.shape)
    values = torch.empty_like(matrices)
    for index, matrix in enumerate(matrices):
        stack.write(index, matrix.contiguous())
        values[index] = stack.dequantize(index, torch.float32)
    return values


def difference(losses: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Mean of the windows' differences, and its standard error."""
    each = [a - b for a, b in zip(losses, reference, strict=True)]
    return {"mean": statistics.fmean(each), "standard_error": statistics.stdev(each) / len(each) ** 0.5}


def of_model(name: str, work: Path, windows: Tensor, task: Task) -> dict[str, Any]:
    """`measure` of one of the models, which is made in `work` where it is not embedded.

    Args:
        name: `embedded`, `many experts` or `tuned`.
        work: a folder of its own.
        windows: token ids [W, T].
        task: what the tuned one is tuned on, and scored.
    """
    if name != "tuned":
        return measure(models.EMBEDDED if name == "embedded" else models.many_experts(work / "many-experts"), windows)
    folder = cells.tuned_model(task, work / "tuned")
    encode = models.tokenizer()
    data = DataConfig(format="prompt-completion", **task.data)
    examples = prepare_examples(data, "eval", encode)

    def score(model: torch.nn.Module) -> dict[str, float]:
        scored = score_task(model, encode, examples.examples, TaskConfig(**task.task))
        return {task.figure: scored[task.figure], "exact_match": scored["exact_match"]}

    return measure(folder, windows, score) | {"answers": task.task["rows"]}


def measure(
    folder: Path, windows: Tensor, score: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """Loss of a model in 16 bits and in NF4, of each part, kind and layer; with `score`, also a task's figures.

    Args:
        folder: the 16-bit checkpoint.
        windows: token ids [W, T] of text that the model was not trained on.
        score: a model's figures on a task.
    """
    started = time.monotonic()
    simulated = Simulated(folder)
    parts = [part for part in simulated.parts if part.kind != "lm_head"]

    def taken(in_nf4: Iterable[Part]) -> list[float]:
        simulated.set(in_nf4)
        return window_losses(simulated.model, windows)

    def scored() -> dict[str, Any]:
        return {"score": dict(score(simulated.model))} if score else {}

    reference = taken([])
    found: dict[str, Any] = {
        "windows": len(windows),
        "window": windows.shape[1],
        "loss_16bit": statistics.fmean(reference),
        "16bit": scored(),
    }
    whole = taken(parts)
    found["nf4"] = difference(whole, reference) | scored()

    def only(name: str, chosen: list[Part]) -> dict[str, Any]:
        alone = difference(taken(chosen), reference) | (scored() if name in KINDS else {})
        rest = difference(whole, taken([part for part in parts if part not in chosen]))
        count = sum(map(simulated.num_weights, chosen))
        return {"what": name, "weights": count, "only_this": alone, "given_back": rest}

    found["kinds"] = [only(kind, [part for part in parts if part.kind == kind]) for kind in KINDS[:-1]]
    layers = sorted({part.layer for part in parts if part.layer is not None})
    found["layers"] = [only(f"layer {layer}", [part for part in parts if part.layer == layer]) for layer in layers]
    found["parts"] = [only(str(part), [part]) | {"relative_error": simulated.error(part)} for part in parts]
    head = [part for part in simulated.parts if part.kind == "lm_head"]
    found["head"] = difference(taken(head), reference) | {"relative_error": simulated.error(head[0])}
    found["mixed"] = list(_mixed(simulated, parts, found["parts"], reference, taken, scored))
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _mixed(
    simulated: Simulated,
    parts: list[Part],
    costs: list[dict[str, Any]],
    reference: list[float],
    taken: Callable[[Iterable[Part]], list[float]],
    scored: Callable[[], dict[str, Any]],
) -> Iterable[dict[str, Any]]:
    """What is left of the loss when the most sensitive parts stay in 16 bits, as many as a budget of bytes allows.

    Parts are taken by what they give back a byte while their bytes fit.
    """
    sizes = [simulated.num_weights(part) for part in parts]
    gain = [cost["given_back"]["mean"] / size for cost, size in zip(costs, sizes, strict=True)]
    order = sorted(range(len(parts)), key=lambda index: -gain[index])
    nf4_bytes = sum(sizes) * 4.13 / 8
    for share in (0.1, 0.25, 0.5, 1.0):
        kept: list[Part] = []
        left = share * nf4_bytes
        for index in order:
            extra = sizes[index] * (16 - 4.13) / 8
            if extra <= left:
                kept.append(parts[index])
                left -= extra
        losses = taken([part for part in parts if part not in kept])
        yield {
            "more_bytes": share - left / nf4_bytes,
            "in_16_bits": [str(part) for part in kept],
            **difference(losses, reference),
            **scored(),
        }
