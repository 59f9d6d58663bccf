"""Compile every kernel that an expert layer launches on a GPU, for every supported target, on a machine without one.

    python tools/compile_kernels.py [--targets 80 90 gfx942] [--json OUT]

The layer itself is run on `meta` tensors with its launches noted instead of made, so that what is compiled is what
would run: Mixtral-8x7B's shape and Qwen3-30B-A3B's, few tokens and many, both routes, with the adapters and the dropout
of the recipe. Exit status 1 if a kernel does not compile, spills more than one register, or takes more shared memory
than there is.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

# Triton 3.9 warns where this is unset; every launch here says for itself whether sums are contracted.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor

from expertune.kernels.expert_mlp.grouped import GroupedRoute
from expertune.kernels.expert_mlp.plan import Activation, Chunk, FrozenLayer, Gradients
from expertune.kernels.gpu import nf4
from expertune.kernels.gpu.launch import Launch, Target, recording
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.nf4 import Nf4Stack
from launch_compiler import TARGETS, compile_launch, distinct


class Shape(NamedTuple):
    """An expert layer: experts, hidden and intermediate size, experts per token, rank of its adapters."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    rank: int


SHAPES = {
    "mixtral-8x7b": Shape(8, 4096, 14336, 2, 8),
    "qwen3-30b-a3b": Shape(128, 2048, 768, 8, 16),
    "rank-64": Shape(8, 4096, 14336, 2, 64),
}
TOKENS = (320, 8192)
# One register, written once and read once. Triton 3.9 spills it in the largest grouped GEMMs on sm_120.
MOST_SPILLED_BYTES = 8
META = torch.device("meta")


def layer_launches(shape: Shape, tokens: int, route: GroupedRoute, dropout: float, target: Target) -> list[Launch]:
    """What forward and backward of one layer launch, in order."""
    E, D, F, K, r = shape
    gate_up, down = Nf4Stack(2 * E, F, D, device=META), Nf4Stack(E, D, F, device=META)
    layer = FrozenLayer(gate_up.bytes, down.bytes, Activation(_never_called, columnwise=True, swiglu=True))
    seeds = torch.zeros(3, dtype=torch.int64, device=META).unbind()
    widths = ((D, F), (D, F), (F, D))
    updates = [
        LoraUpdate(part, _empty(E, r, columns), _empty(E, rows, r), 2.0, dropout, seeds[part])
        for part, (columns, rows) in enumerate(widths)
    ]
    hidden, index = _empty(tokens, D, dtype=torch.bfloat16), _empty(tokens, K, dtype=torch.int64)
    weights, h = _empty(tokens, K, dtype=torch.bfloat16), [_empty(tokens * K, r) for _ in updates]
    da, db = [torch.empty_like(u.a) for u in updates], [torch.empty_like(u.b) for u in updates]
    chunk = Chunk(hidden, index, weights)
    gradients = Gradients(torch.empty_like(hidden), torch.empty_like(weights), da, db)
    with recording(target) as notes:
        route.forward(chunk, layer, updates, h, torch.empty_like(hidden))
        route.backward(torch.empty_like(hidden), chunk, layer, updates, h, gradients)
    return notes


def kernels(target: Target, shapes: Sequence[str], tokens: Sequence[int], quick: bool) -> list[Launch]:
    """Every distinct kernel that layers of these shapes launch in bfloat16."""
    notes: list[Launch] = []
    # Groups of dequantized experts begin at numbers that Triton compiles for again: 0, 1, multiples of 16, others.
    routes = (GroupedRoute(False), GroupedRoute(True, buffer_bytes=2**33 if quick else 2**30))
    for name, count, route, dropout in product(shapes, tokens, routes, (0.05,) if quick else (0.0, 0.05)):
        notes += layer_launches(SHAPES[name], count, route, dropout, target)
    for name in shapes:
        notes += published_blocks_launches(SHAPES[name], target)
    return distinct(notes)


def published_blocks_launches(shape: Shape, target: Target) -> list[Launch]:
    """Dequantizing MXFP4 experts: all there is beside NF4's kernels."""
    E, D, F, *_ = shape
    stack = Nf4Stack(E, D, F, device=META, scheme="mxfp4")
    with recording(target) as notes:
        nf4.dequantize(stack.bytes, slice(0, E), _empty(E * D, F, dtype=torch.bfloat16))
    return notes


def compile_target(
    target: Target, shapes: Sequence[str], tokens: Sequence[int], quick: bool, once: bool
) -> list[dict[str, Any]]:
    """Compile all kernels of one target, or each in one variant; a failure is a record with `error`."""
    notes, records = kernels(target, shapes, tokens, quick), []
    if once:
        notes = list({note.kernel.__name__: note for note in reversed(notes)}.values())
    for note in notes:
        try:
            compiled = compile_launch(note, target)
        except Exception as error:
            records.append({"kernel": note.kernel.__name__, "target": str(target.arch), "error": str(error)[-2000:]})
            continue
        record = compiled.record()
        if compiled.spilled_bytes > MOST_SPILLED_BYTES:
            record["error"] = f"{compiled.spilled_bytes} bytes spilled"
        if compiled.shared_bytes > target.shared_bytes:
            record["error"] = f"{compiled.shared_bytes} bytes of shared memory, {target.shared_bytes} there are"
        records.append(record)
    return records


def main() -> int:
    """Compile, print a line for each kernel, and say how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=[str(target.arch) for target in TARGETS])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--quick", action="store_true", help="what a step of the recipe launches, and no variant")
    parser.add_argument("--once", action="store_true", help="each kernel in the first of its variants")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [target for target in TARGETS if str(target.arch) in arguments.targets]
    started = time.monotonic()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        settings = {name: getattr(arguments, name) for name in ("shapes", "tokens", "quick", "once")}
        compiled = partial(compile_target, **settings)
        records = [record for found in pool.map(compiled, chosen) for record in found]
    for record in records:
        constants = record.get("constants", {})
        tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK") if name in constants)
        words = [record["target"], record["kernel"], tile, *(n for n in ("NF4", "SWIGLU") if constants.get(n))]
        said = record.get("error") or f"{record['registers']} registers, {record['shared_bytes']} bytes shared"
        print(*words, f"warps {constants.get('num_warps')}:", said)
    failed = sum("error" in record for record in records)
    print(f"triton {triton.__version__}: {len(records)} kernels, {failed} failed, {time.monotonic() - started:.0f} s")
    if arguments.json:
        beside = arguments.json.with_suffix(".new")
        beside.write_text(json.dumps({"triton": triton.__version__, "kernels": records}, indent=1), encoding="utf-8")
        beside.replace(arguments.json)
    return 1 if failed else 0


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _never_called(gate_up: Tensor) -> Tensor:
    raise AssertionError("a gated layer's activation is in the kernel")


if __name__ == "__main__":
    sys.exit(main())
