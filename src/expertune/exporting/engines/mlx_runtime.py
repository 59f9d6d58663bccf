"""What mlx-lm makes of a checkpoint, and its log-probabilities. Imports nothing of Expertune.

    python mlx_runtime.py REQUEST.json

One of three requests. `map`: a folder whose weights are small tensors under the names of a checkpoint; what mlx-lm
makes of them goes to `mapped.safetensors` beside the request, by the names of its modules, and as `!CLASS!NAME` where
these take no adapter. `fuse`: `model`, `adapter` and `to`, folders; base and adapter become one model. Or
`prompts`, lists of token ids, and `cases`, by name: `model`, a folder, and `adapter`, a folder; of each case
`CASE.safetensors` beside the request holds `logprobs` [positions, V], float32.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_adapters, load_model, load_tokenizer, save
from safetensors.numpy import save_file

TAKE_ADAPTERS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
"""Whose adapters are `lora_a` and `lora_b` as Expertune writes them; see `mlx_lm.tuner.utils`."""

COLUMNS = 2
"""Of a small tensor, in place of a weight's input features."""

VERSIONS = f"mlx-lm {version('mlx-lm')}, MLX {version('mlx')}"


def main() -> None:
    """Answer the request."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    if "map" in request:
        found = mapped(Path(request["map"]))
        save_file(found, str(path.with_name("mapped.safetensors")), {"engine": VERSIONS})
    elif "fuse" in request:
        fuse(**request["fuse"])
    else:
        for name, case in request["cases"].items():
            logprobs = answered(case, request["prompts"])
            save_file({"logprobs": logprobs}, str(path.with_name(f"{name}.safetensors")), {"engine": VERSIONS})


def mapped(folder: Path) -> dict[str, np.ndarray]:
    """Weights as a model of this folder's config holds them, whatever their shapes."""
    model, _ = load_model(folder, lazy=True, strict=False)
    modules, found = dict(model.named_modules()), {}
    for name, weight in tree_flatten(model.parameters()):
        module, _, leaf = name.rpartition(".")
        # What the folder does not have is there in its full size, not yet computed; it stays so.
        if leaf == "weight" and weight.shape[-1] == COLUMNS:
            kind = type(modules[module])
            bits = np.array(weight)
            values = bits.view(np.float32) if bits.dtype == np.uint32 else bits.astype(np.float32)
            found[module if issubclass(kind, TAKE_ADAPTERS) else f"!{kind.__name__}!{module}"] = values
    return found


def fuse(model: str, adapter: str, to: str) -> None:
    """Write base and adapter as one model: summed in float32, and rounded once; weights are read one by one."""
    loaded, config = load_model(Path(model), lazy=True)
    dtypes = {name: weight.dtype for name, weight in tree_flatten(loaded.parameters())}
    load_adapters(loaded, adapter)
    loaded.set_dtype(mx.float32)
    fused = [(name, module.fuse()) for name, module in loaded.named_modules() if hasattr(module, "fuse")]
    loaded.update_modules(tree_unflatten(fused))
    weights = tree_flatten(loaded.parameters())
    loaded.load_weights([(name, weight.astype(dtypes[name])) for name, weight in weights])
    save(to, model, loaded, load_tokenizer(Path(model)), config)


def answered(case: dict[str, Any], prompts: list[list[int]]) -> np.ndarray:
    """[positions of all prompts, V], in float32."""
    model, _ = load_model(Path(case["model"]), lazy=True)
    if "adapter" in case:
        load_adapters(model, case["adapter"])
    model.set_dtype(mx.float32)
    model.eval()
    logits = [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in prompts]
    shifted = [each - each.max(axis=-1, keepdims=True) for each in logits]
    return np.concatenate([each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in shifted])


if __name__ == "__main__":
    main()
