"""Tensors of a merged GGUF file beside base and adapter, each expert by itself. Imports nothing of Expertune.

    python gguf_tensors.py REQUEST.json

The request: `gguf`, the folder of llama.cpp's Python package, which reads the files; `merged`, the file that is
checked; `base`, one with the base's own values, nothing rounded; `adapter`, the adapter in float32; and `rounded`, the
type that a sum was rounded to before it got the file's. The result, `compared.json` beside it: `matrices`, how many
there are; `largest`, the largest difference from what is expected; `wrong`, of each that differs by more than `allowed`
its tensor, and its expert or null; and `unplaced`, tensors that the adapter changes and the file does not have. Of a
file that cannot be opened it has `damaged` alone, the reason.

A difference is told as a share of what the adapter changes: 1 where it was left out, 0 where everything is as it should
be, but for sums that fall between two values. Where it changes nothing, as a share of two steps of the tensor's types:
rounding is a quarter of that at most.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 2**24  # weights at a time

# From a value to the next one, as a share of it; of q8_0, whose steps a block's largest value makes, of its usual ones.
_STEPS = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 2**-5}


def main(path: Path) -> None:
    """Compare what a request names."""
    request = json.loads(path.read_text(encoding="utf-8"))
    sys.path.insert(0, request["gguf"])
    path.with_name("compared.json").write_text(json.dumps(compare(request)), encoding="utf-8")


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request."""
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        merged = GGUFReader(request["merged"])
    except Exception as error:  # whatever its bytes lead the reader to
        return {"damaged": f"{type(error).__name__}: {str(error)[:200]}"}
    base, adapter = GGUFReader(request["base"]), GGUFReader(request["adapter"])
    changed = {tensor.name.rpartition(".lora_")[0] for tensor in adapter.tensors}
    unplaced = sorted(changed - {tensor.name for tensor in merged.tensors})
    found = list(differences(merged, base, adapter, GGMLQuantizationType[request["rounded"].upper()]))
    wrong = [[tensor, expert] for tensor, expert, difference in found if not difference <= request["allowed"]]
    largest = max(difference for _, _, difference in found)
    told = {"matrices": len(found), "largest": largest if math.isfinite(largest) else None}
    return told | {"wrong": wrong, "unplaced": unplaced}


def differences(merged: Any, base: Any, adapter: Any, rounded: Any) -> Iterator[tuple[str, int | None, float]]:
    """Tensor, expert, and how far it is from base and adapter."""
    alpha = float(adapter.fields["adapter.lora.alpha"].contents())
    factors = {tensor.name: tensor.data for tensor in adapter.tensors}
    before = {tensor.name: tensor for tensor in base.tensors}
    yield from ((name, None, math.inf) for name in before.keys() - {tensor.name for tensor in merged.tensors})
    for tensor in merged.tensors:
        old = before.get(tensor.name)
        if old is None or list(old.shape) != list(tensor.shape):
            yield tensor.name, None, math.inf
            continue
        pair = [factors.get(f"{tensor.name}.lora_{factor}") for factor in "ab"]
        experts = range(tensor.data.shape[0]) if tensor.data.ndim == 3 else [None]
        for expert in experts:
            new_data, old_data = (
                np.atleast_2d(each.data if expert is None else each.data[expert]) for each in (tensor, old)
            )
            a, b = (None if each is None else each if expert is None else each[expert] for each in pair)
            types = tensor.tensor_type, old.tensor_type, rounded
            update = None if a is None or b is None else (alpha / a.shape[0] * b, a)
            yield tensor.name, expert, _difference(new_data, old_data, update, types)


def _difference(new: Any, old: Any, update: tuple[Any, Any] | None, types: tuple[Any, Any, Any]) -> float:
    """How far a matrix is from base and adapter; see the file's own words."""
    from gguf.quants import dequantize, quantize

    def as_in(values: Any, *kinds: Any) -> Any:
        for kind in kinds:
            values = dequantize(quantize(np.ascontiguousarray(values), kind), kind)
        return values

    kind, old_kind, rounded = types
    step = max(1, _BLOCK // max(1, new.shape[1]))
    # Not all tensors were rounded: a router may be in float32 among others in 16 bits.
    errors, change, whole = {(rounded, kind): 0.0, (kind,): 0.0}, 0.0, 0.0
    for first in range(0, len(new), step):
        rows = slice(first, first + step)
        found, base = dequantize(new[rows], kind), dequantize(old[rows], old_kind)
        total = base if update is None else base + update[0][rows] @ update[1]
        for kinds in errors:
            errors[kinds] += float(np.square(found - as_in(total, *kinds), dtype=np.float64).sum())
        change += float(np.square(as_in(total, rounded, kind) - as_in(base, rounded, kind), dtype=np.float64).sum())
        whole += float(np.square(base, dtype=np.float64).sum())
    error = min(errors.values())
    if not math.isfinite(error + change + whole):
        return math.inf
    steps = 2 * max(_STEPS.get(each.name, 0.0) for each in (rounded, kind))
    size = change if change else whole * steps**2
    return math.sqrt(error / size) if size else math.inf if error else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
