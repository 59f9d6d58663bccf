"""Log-probabilities of the trained model itself, and of the values that its 4-bit weights stand for.

    python trained.py REQUEST.json

The request is that of `stock.py`, with `base`: `folder`, `adapter` and `quantization` of the run. Cases with `live`:
the model with its 4-bit experts and the adapter, as it was trained. Others: stock transformers over the dequantized
weights, `updates` added to them and rounded as there; and what is in 4 bits to `*` of `rounded`, where it has that.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.adapt.attach import attach
from expertune.checkpoint.formats.nf4_folder import CALIBRATED
from expertune.checkpoint.load import LoadedModel, LoadOptions, load_model
from expertune.checkpoint.meta import build_twin
from expertune.checkpoint.moments import Moments
from expertune.config import LoraSection, QuantizationConfig
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from expertune.exporting.dequantized import linear_weight
from expertune.exporting.engines import stock


@torch.no_grad()
def main() -> None:
    """Answer the cases of a request."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    base = request["base"]
    quantization = QuantizationConfig.model_validate(base["quantization"])
    importance = Moments.load(Path(base["calibration"])) if quantization.fit == CALIBRATED else None
    options = LoadOptions(importance=importance)
    loaded = load_model(base["folder"], quantization, torch.float32, "cpu", request["trust"], options)
    stock_cases = {name: case for name, case in request["cases"].items() if not case.get("live")}
    if stock_cases:
        answer_stock(loaded, stock_cases, request, path.parent)
    for name in request["cases"].keys() - stock_cases.keys():
        adapted = attach(loaded, LoraSection(init_from=base["adapter"]), base["folder"]).eval()
        stock.answer(adapted, request, path.parent / f"{name}.safetensors", "Expertune")


def answer_stock(loaded: LoadedModel, cases: dict[str, Any], request: dict[str, Any], folder: Path) -> None:
    """Answer by stock transformers, over the values of the 4-bit weights."""
    twin, packed = dequantized(loaded.model)
    for name, case in cases.items():
        before = update(twin, packed, case)
        experts = request["experts"] if "updates" in case else ()
        stock.answer(twin, request, folder / f"{name}.safetensors", "transformers", experts)
        for parameter, values in before.items():
            twin.get_parameter(parameter).copy_(values)


@torch.no_grad()
def update(twin: PreTrainedModel, packed: list[str], case: dict[str, Any]) -> dict[str, Tensor]:
    """Make of the values of 4-bit weights what a case has; returns what the parameters were."""
    before = {parameter: twin.get_parameter(parameter).clone() for parameter in packed}
    rounded = case.get("rounded") or {}
    plain = {parameter: dtype for parameter, dtype in rounded.items() if parameter not in before}
    others = stock.update(twin, case | {"rounded": plain}) if "updates" in case else {}
    for parameter in packed if rounded else ():
        values = twin.get_parameter(parameter)
        values.copy_(values.to(getattr(torch, rounded["*"])))
    return others | before


def dequantized(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A stock model, float32, over the values of a model's 4-bit weights; and the names of its packed parameters."""
    twin = build_twin(model)
    twin.config._experts_implementation = "eager"
    packed: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Nf4Experts):
            owner = twin.get_submodule(name)
            for weight in module.spec.weight_names:
                owner._parameters[weight] = frozen(stack_of(module, weight))
                packed.append(f"{name}.{weight}")
        elif isinstance(module, Linear4bit):
            twin.get_submodule(name)._parameters["weight"] = frozen(linear_weight(module))
            packed.append(f"{name}.weight")
    for name, owner in twin.named_modules():
        for leaf in [leaf for leaf, value in owner._parameters.items() if value is not None and value.is_meta]:
            held = model.get_submodule(name)
            values = held.get_parameter(leaf)
            owner._parameters[leaf] = frozen(bias_of(held, leaf, values) if isinstance(held, Nf4Experts) else values)
        for leaf in owner._buffers:
            owner._buffers[leaf] = model.get_submodule(name)._buffers[leaf]
    twin.tie_weights()
    return twin.eval(), packed


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter of a stock model."""
    return nn.Parameter(values.detach().float().clone(), requires_grad=False)


def stack_of(experts: Nf4Experts, weight: str) -> Tensor:
    """A stack as the family lays it out."""
    spec, projections = experts.spec, layout.fused_projections(experts.spec, weight)
    rows = [
        layout.join_rows(spec, weight, [experts.dequantize(expert, each, torch.float32) for each in projections])
        for expert in range(spec.num_experts)
    ]
    stack = torch.stack(rows)
    return stack.mT if spec.is_transposed else stack


def bias_of(experts: Nf4Experts, leaf: str, bias: Tensor) -> Tensor:
    """A bias of all experts as the family lays it out."""
    weight = leaf.removesuffix("_bias")
    if weight not in experts.spec.weight_names:
        return bias
    parts = bias.T.chunk(len(layout.fused_projections(experts.spec, weight)))
    return layout.join_rows(experts.spec, weight, parts).T


if __name__ == "__main__":
    main()
