"""Decoding NF4 to the products' dtype, a tile of rows at a time: weights and bytes per second, beside bitsandbytes."""

import argparse
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch

from benchmarks import report
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from benchmarks.timing import interleave, median_ratio
from expertune.kernels.dequant_gemm import Scratch
from expertune.kernels.nf4 import Nf4Stack, dequantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=7168, help="default 7168")
    parser.add_argument("--columns", type=int, default=2048, help="default 2048")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    report.add_dtype_argument(parser)
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: a value differs from what bitsandbytes decodes.
    """
    dtype = report.resolve_dtype(args.dtype, "cpu")
    stack = Nf4Stack(1, args.rows, args.columns)
    stack.write(0, torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)))
    scratch = Scratch(torch.device("cpu"), dtype)
    step = scratch.tile_size(args.rows, args.columns)
    transposed, state = bitsandbytes_weight(stack, 0, dtype)
    packed = transposed.t()
    if not torch.equal(stack.dequantize(0, dtype), bnb.dequantize_4bit(packed, state)):
        raise report.CorrectnessError("decoded values are not bitsandbytes'")

    def tiles() -> None:
        for start in range(0, args.rows, step):
            rows = slice(start, min(start + step, args.rows))
            dequantize(stack.bytes, 0, scratch.tile(rows.stop - start, args.columns), rows=rows)

    source = torch.empty(args.rows, args.columns, dtype=dtype)
    target = torch.empty_like(source)
    runs = {
        "ours": tiles,
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
        "copy of the decoded matrix": lambda: target.copy_(source),
    }
    seconds = interleave(runs, args.rounds)
    weights = args.rows * args.columns
    result = {
        "benchmark": "decode",
        "shape": [args.rows, args.columns],
        "dtype": report.name_of(dtype),
        "tile_rows": step,
        "weights_per_second": {name: report.rate(weights, times) for name, times in seconds.items()},
        "ratio": median_ratio(seconds["bitsandbytes"], seconds["ours"]),
        "seconds": seconds,
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [
        [name, f"{rate / 1e9:.2f}", f"{rate * dtype.itemsize / 1e9:.1f}"]
        for name, rate in result["weights_per_second"].items()
    ]
    report.show(
        f"NF4 to {result['dtype']}, {args.rows} x {args.columns}, on {result['device']}, {result['threads']} threads",
        ["", "billion weights/s", "GB/s out"],
        rows,
        [f"ours over bitsandbytes: {result['ratio']:.1f}; identical values"],
    )
    return result
