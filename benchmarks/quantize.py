"""NF4 quantization of one matrix, double quantization included: weights per second, beside bitsandbytes."""

import argparse
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.timing import interleave, median_ratio
from expertune.kernels import native
from expertune.kernels.nf4 import quantize_matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4096, help="default 4096")
    parser.add_argument("--columns", type=int, default=4096, help="default 4096")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: a byte or a scale differs from bitsandbytes'.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(args.rows, args.columns, generator=generator).mul_(0.02).to(torch.bfloat16)
    _require_same_bytes(matrix)
    runs = {"ours": lambda: quantize_matrix(matrix), "bitsandbytes": lambda: _by_bitsandbytes(matrix)}
    seconds = interleave(runs, args.rounds)
    result = {
        "benchmark": "quantize",
        "shape": list(matrix.shape),
        "source_dtype": "bfloat16",
        "weights_per_second": {name: report.rate(matrix.numel(), times) for name, times in seconds.items()},
        "ratio": median_ratio(seconds["bitsandbytes"], seconds["ours"]),
        "seconds": seconds,
        "native": native.status().library is not None,
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [
        [name, f"{rate / 1e6:,.0f}", f"{result['ratio'] if name != 'ours' else 1.0:.1f}"]
        for name, rate in result["weights_per_second"].items()
    ]
    report.show(
        f"NF4 quantization of {args.rows} x {args.columns} bfloat16 on {result['device']}, {result['threads']} threads",
        ["", "million weights/s", "ours over it"],
        rows,
        ["identical bytes and scales"],
    )
    return result


def _by_bitsandbytes(matrix: Tensor) -> bnb.nn.Params4bit:
    parameter = bnb.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4", blocksize=64)
    return parameter.to("cpu")


def _require_same_bytes(matrix: Tensor) -> None:
    packed, absmax, nested, offset = quantize_matrix(matrix)
    theirs = _by_bitsandbytes(matrix)
    state = theirs.quant_state
    pairs = ((packed, theirs.data), (absmax, state.absmax), (nested, state.state2.absmax), (offset, state.offset))
    if not all(torch.equal(one.flatten(), other.flatten()) for one, other in pairs):
        raise report.CorrectnessError("the bytes of a quantized matrix are not bitsandbytes'")
