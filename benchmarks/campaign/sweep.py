"""Tile shapes: every candidate of every grouped product, alone, to correct `expertune.kernels.gpu.configs` by.

Candidates are compiled ahead by several processes, into Triton's own cache; one that does not compile, does not fit, or
gives another result than the table's own is listed with its reason and no time.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.campaign import measure, record, shapes, weights
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.variants import FUSED, TRITON, passed_variants
from benchmarks.workload import Shape, token_ids
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack

_SHARE_FOR_COMPILING = 0.45
_MOST_DIFFERENCE = 1e-2


@dataclass(frozen=True)
class Kind:
    """A grouped product: its weights, and what it does with them."""

    name: str
    nf4: bool
    swiglu: bool = False
    transposed: bool = False


KINDS = tuple(
    Kind(f"{name} {direction}", name == "fused", direction == "swiglu", direction == "transposed")
    for name in ("fused", "dense")
    for direction in ("swiglu", "transposed", "forward")
)


def run(args: argparse.Namespace, out: Record) -> None:
    """One item for each product, shape and number of tokens."""
    device = out.device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        out.item("sweep", lambda: measure.unmeasured("the kernels need a GPU, or TRITON_INTERPRET=1 for a dry run"))
        return
    from expertune.kernels.gpu import configs
    from expertune.kernels.gpu.launch import target_of

    allowed = passed_variants(args.out, device.type)
    out.values["routes"] = list(allowed)
    dense = TRITON if device.type == "cuda" else "dequant_gemm"
    kinds = [kind for kind in KINDS if (FUSED if kind.nf4 else dense) in allowed]
    plans = []
    for tokens in (8,) if args.small else shapes.tokens(False):
        for name, make in shapes.MODELS.items():
            shape = Shape(512, 64, 1, 2, 2) if args.small else make(False).layer
            for kind in kinds:
                rows_per_expert = tokens * shape.top_k / shape.experts
                gemm = configs.Gemm(
                    torch.bfloat16, kind.nf4, kind.swiglu, kind.transposed, rows_per_expert, shape.hidden
                )
                found = configs.candidates(target_of(device), gemm)
                plans.append((name, shape, tokens, kind, found[:2] if args.small else found))
    if device.type == "cuda":
        out.item("compiled ahead", lambda: _compile_ahead(plans, out), needs_s=30)
    ready: dict[str, _Problem] = {}
    for name, shape, tokens, kind, found in plans:
        key = f"{name} T={tokens}"
        if key not in ready:
            ready.clear()  # one shape's weights at a time
            ready[key] = _Problem(shape, tokens, args, device)
        item = f"{kind.name} {key}"
        problem = ready[key]
        out.item(item, lambda problem=problem, kind=kind, found=found: _sweep(problem, kind, found, out), needs_s=5)


class _Problem:
    """Weights, rows and low-rank terms of one layer's first product, as the layer hands them to the kernels."""

    def __init__(self, shape: Shape, tokens: int, args: argparse.Namespace | None, device: torch.device) -> None:
        E, D, size, rank = shape.experts, shape.hidden, shape.intermediate, 8
        self.shape, self.device = shape, device
        rows = tokens * shape.top_k

        def normal(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device=device).normal_()

        self.stack = Nf4Stack(2 * E, size, D, device=device)
        self.hidden, self.dgate_up = normal(tokens, D), normal(rows, 2 * size)
        self.low = [normal(rows, rank, dtype=torch.float32) for _ in range(2)]
        self.b = [normal(E, size, rank, dtype=torch.float32) * 0.01 for _ in range(2)]
        self.token_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.offsets_E = torch.zeros(E, dtype=torch.int64, device=device)
        self.decoded: Tensor | None = None
        if args is not None:
            weights.fill(self.stack)
            self._route(token_ids(args.text, tokens))

    def _route(self, ids_T: Tensor) -> None:
        """Equal tokens go to equal experts, as in a model."""
        generator = torch.Generator().manual_seed(0)
        E, K = self.shape.experts, self.shape.top_k
        index_TK = torch.rand(int(ids_T.max()) + 1, E, generator=generator)[ids_T].topk(K, dim=-1).indices
        order_R = index_TK.flatten().argsort(stable=True)
        self.token_R.copy_(order_R // K)
        self.offsets_E.copy_(torch.bincount(index_TK.flatten(), minlength=E).cumsum(0))

    def product(self, kind: Kind) -> tuple[Callable[[], None], Tensor]:
        """The product of a kind, and where it writes."""
        from expertune.kernels.gpu.grouped_gemm import Update, grouped_gemm, input_gradient

        rows, size = self.token_R.shape[0], self.shape.intermediate
        weight = self._weight(kind)
        if kind.transposed:
            out = torch.zeros(rows, self.shape.hidden, device=self.device)
            # Added to what is there, as the layer adds it to the low-rank part.
            return lambda: input_gradient(self.dgate_up, weight, self.offsets_E, out, add=True), out
        width = size if kind.swiglu else 2 * size
        out = torch.empty(rows, width, dtype=torch.bfloat16, device=self.device)
        updates = [Update(low, b, part, 2.0) for part, (low, b) in enumerate(zip(self.low, self.b, strict=True))]
        return (
            lambda: grouped_gemm(self.hidden, weight, self.offsets_E, out, updates, self.token_R, swiglu=kind.swiglu),
            out,
        )

    def _weight(self, kind: Kind) -> Any:
        from expertune.kernels.gpu import nf4
        from expertune.kernels.gpu.grouped_gemm import Dequantized

        if kind.nf4:
            return Nf4Bytes(*self.stack.bytes)
        if self.decoded is None:
            size = (self.stack.num_matrices, self.stack.out_features, self.stack.in_features)
            self.decoded = torch.empty(size, dtype=torch.bfloat16, device=self.device)
            if self.device.type != "meta":
                nf4.dequantize(self.stack.bytes, slice(0, self.stack.num_matrices), self.decoded.flatten(0, 1))
        return Dequantized(self.decoded)


def _sweep(problem: _Problem, kind: Kind, found: list[Any], out: Record) -> Item:
    """Median seconds of each candidate; the first is the table's own."""
    from expertune.kernels.gpu import configs

    multiply, target = problem.product(kind)
    shape, rows = problem.shape, problem.token_R.shape[0]
    flops = 2 * rows * 2 * shape.intermediate * shape.hidden
    result: Item = {"flops": flops, "rows_per_expert": rows / shape.experts, "candidates": []}
    expected: Tensor | None = None
    for config in found:
        out.require_time() if expected is None else None
        entry: Item = {"config": config._asdict()}
        result["candidates"].append(entry)
        if out.remaining_s <= 0:
            entry["error"] = "out of time"
            continue
        try:
            with configs.forced(config):
                target.zero_()
                started = time.perf_counter()
                multiply()
                measure.synchronize(out.device)
                entry["first_s"] = round(time.perf_counter() - started, 3)
                if expected is None:
                    expected = target.clone()
                error = float((target.float() - expected.float()).norm() / expected.float().norm())
                if not error <= _MOST_DIFFERENCE:
                    entry["error"] = f"its result is off by {error:.1e}"
                    continue
                measure.seconds(multiply, out.device)
                times = [measure.seconds(multiply, out.device) for _ in range(1 if out.small else 5)]
                entry["seconds"] = statistics.median(times)
        except Exception as error:
            entry["error"] = record.error_line(error)[:200]
    timed = [entry for entry in result["candidates"] if "seconds" in entry]
    if timed:
        best = min(timed, key=lambda entry: entry["seconds"])
        result["best"], result["flops_per_second"] = best, flops / best["seconds"]
        own = result["candidates"][0].get("seconds")
        result["own_over_best"] = own and own / best["seconds"]
    return result


def _compile_ahead(plans: list[Any], out: Record) -> Item:
    """Every distinct kernel once, in as many processes as there are cores to spare; others are built in their turn."""
    distinct = {(shape, tokens, kind, config) for _, shape, tokens, kind, found in plans for config in found}
    # In the order in which they will be timed.
    jobs = sorted(distinct, key=lambda job: (job[1], job[0].hidden, KINDS.index(job[2]), job[3]))
    started, failed, done = time.monotonic(), [], 0
    pool = ProcessPoolExecutor(
        max(min((os.cpu_count() or 2) - 2, 14, len(jobs)), 1), multiprocessing.get_context("spawn")
    )
    try:
        futures = [pool.submit(_compile, *job) for job in jobs]
        for future in as_completed(futures, timeout=max(out.remaining_s * _SHARE_FOR_COMPILING, 1)):
            done += 1
            if (error := future.exception()) is not None:
                failed.append(record.error_line(error)[:200])
    except TimeoutError:
        pass
    finally:
        # Nothing may be left on the device when clocks start.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
    found = {"jobs": len(jobs), "done": done, "failed": len(failed), "first_failures": failed[:5]}
    return found | {"seconds": time.monotonic() - started}


def _compile(shape: Shape, tokens: int, kind: Kind, config: Any) -> None:
    """Build one kernel as its launch would, from tensors without memory."""
    from triton.runtime.jit import MockTensor

    from expertune.kernels.gpu import configs, launch

    target = launch.target_of(torch.device("cuda", torch.cuda.current_device()))
    with launch.recording(target) as notes, configs.forced(config):
        multiply, _ = _Problem(shape, tokens, None, torch.device("meta")).product(kind)
        multiply()
    (note,) = notes
    arguments = [MockTensor(value.dtype) if isinstance(value, Tensor) else value for value in note.arguments]
    note.kernel.warmup(*arguments, grid=note.grid, **note.constants, **note.options)
