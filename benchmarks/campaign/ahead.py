"""Kernels built ahead by several processes, into Triton's cache on disk, where the stages then find them.

One process would build a hundred kernels one by one. What runs here is timed nowhere.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.campaign import record, shapes, weights
from benchmarks.campaign.record import Item
from benchmarks.layer import Layer

Job = tuple[Callable[..., object], tuple[Any, ...]]


def in_processes(jobs: Sequence[Job], limit_s: float) -> Item:
    """Run jobs in as many processes as there are cores to spare, until the limit; what fails is counted."""
    workers = max(min((os.cpu_count() or 2) - 2, 14, len(jobs)), 1)
    started = time.monotonic()
    failed: list[str] = []
    done = 0
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        for future in as_completed(futures, timeout=max(limit_s, 1)):
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
    return {
        "jobs": len(jobs),
        "done": done,
        "failed": len(failed),
        "first_failures": failed[:5],
        "workers": workers,
        "seconds": time.monotonic() - started,
    }


def layer_jobs(text: Path) -> list[Job]:
    """What stages 1 and 2 run: the self-check in every dtype, layers of both shapes, and the crossover's layer."""
    parts = (False, True)
    jobs: list[Job] = [(layer, (name, tokens, part, text)) for name, tokens in _LAYERS for part in parts]
    jobs += [(self_check, (dtype, part)) for dtype in ("bfloat16", "float16", "float32") for part in parts]
    return jobs + [(crossover, (rows, part)) for rows in (32, 64, 128) for part in parts]


# Tokens at which other tiles are taken; see `expertune.kernels.gpu.configs`.
_LAYERS = (("mixtral", 320), ("qwen3", 320), ("qwen3", 2048))


def layer(name: str, tokens: int, dequantize_first: bool, text: Path) -> None:
    """Forward and backward of one layer by one route, with dropout."""
    from expertune.kernels import routes

    model = shapes.MODELS[name](False)
    one = Layer(model.layer, model.lora, tokens, text, torch.bfloat16, "cuda", weights.fill)
    # With no choice left open: what would be measured for it here, beside other processes, would be kept.
    run = one.step(one.ours(routes.DEQUANT_GEMM if dequantize_first else routes.FUSED, gemm="triton"))
    for one.dropout in (0.05, 0.0):
        run()
    torch.cuda.synchronize()


def self_check(dtype: str, dequantize_first: bool) -> None:
    """One route of the start-up check."""
    from expertune.kernels.expert_mlp import selfcheck
    from expertune.kernels.expert_mlp.grouped import GroupedRoute

    device = torch.device("cuda", torch.cuda.current_device())
    selfcheck.dequantize_error(device, getattr(torch, dtype))
    selfcheck.layer_error(GroupedRoute(dequantize_first, buffer_bytes=1), device, getattr(torch, dtype))


def crossover(rows: int, dequantize_first: bool) -> None:
    """The layer from which the crossover is measured; its time here is of no use."""
    from expertune.kernels.expert_mlp import calibrate
    from expertune.kernels.expert_mlp.grouped import GroupedRoute

    device = torch.device("cuda", torch.cuda.current_device())
    calibrate.layer_seconds(GroupedRoute(dequantize_first), rows, torch.bfloat16, device)
