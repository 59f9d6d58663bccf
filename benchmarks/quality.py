"""What 4 bits cost, and what each option of the run file wins back, on models small enough to train here.

    python benchmarks/quality.py --json OUT [--page docs/quality.md]     all: what 40 minutes allow (--limit)
    python benchmarks/quality.py --json OUT --quick                      one seed and few variants, in minutes
    python benchmarks/quality.py --json OUT --only "muon" "use_dora"     these variants alone, added to OUT
    python benchmarks/quality.py --json OUT --tables docs/quality.md     nothing is measured: tables from OUT

Two parts. `bits` replaces the weights of 16-bit models by their NF4 values, part by part, and takes the loss. `study`
trains variants of one run on three tasks with three seeds, and takes loss, score, and the loss on other text. OUT is
written after each cell, and what it holds already is not measured again; `--anew` begins again. Each result has the
device, versions and commit that it was measured with, and the page says where these differ.
"""

import argparse
import json
import multiprocessing
import os
import queue
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality_study.origin import origin, with_origins
from benchmarks.quality_study.variants import DEFAULT, REFERENCE, VARIANTS

MODELS = ("embedded", "many experts", "tuned")
TASKS = ("meaning", "act", "book")
MAIN = ("base", "bytes", "start")
QUICK = (REFERENCE, DEFAULT, "fit: mse", "experts: load, share 0.2")
WINDOW = 256
BITS_WINDOWS, OTHER_WINDOWS = 32, 8

Job = tuple[str, ...]


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What is measured, most wanted first: a study that is ended early has whole seeds."""
    if not args.only and not args.quick:
        yield from (("bits", model) for model in MODELS)
    variants = [variant for variant in VARIANTS if not args.only or variant.name in args.only]
    if args.quick:
        variants = [variant for variant in variants if variant.name in QUICK]
    # First each variant once, then all seeds of the main ones, then the rest.
    rounds = [
        (seed, variant)
        for seed in range(1, 1 + (1 if args.quick else args.seeds))
        for variant in variants
        if seed <= variant.seeds
    ]
    rounds.sort(key=lambda each: 0 if each[0] == 1 else 1 if each[1].group in MAIN else 2)
    for seed, variant in rounds:
        yield from (("cell", variant.name, task, str(seed)) for task in args.tasks)


def key(job: Job) -> str:
    """Where a job's result stands in the JSON."""
    return " | ".join(job[1:])


def work(work_dir: Path, todo: "multiprocessing.Queue[Job]", done: "multiprocessing.Queue[Any]") -> None:
    """A worker: takes jobs until there are none."""
    import torch

    from benchmarks.quality_study import bits, cells, models
    from benchmarks.quality_study.tasks import tasks
    from expertune.errors import ExpertuneError

    torch.set_num_threads(1)
    known = tasks(work_dir)
    other_text = models.held_out_windows(OTHER_WINDOWS, WINDOW)
    variants = {variant.name: variant for variant in VARIANTS}
    while True:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        try:
            if job[0] == "bits":
                found = bits.of_model(job[1], work_dir, models.held_out_windows(BITS_WINDOWS, WINDOW), known["meaning"])
            else:
                _, name, task, seed = job
                found = cells.run_cell(variants[name], known[task], int(seed), other_text)
        except ExpertuneError as error:
            found = {"left_out": _said(error)}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {_said(error)}"}
        done.put((job, found))


def _said(error: Exception) -> str:
    """A message on one line, without this machine's folders."""
    text = " ".join(str(error).split())[:400]
    return re.sub(r"(/[\w.+-]+)+/(?=[\w.+-]+)", "", text)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all jobs that OUT does not hold yet, and keep each result at once."""
    from benchmarks import report

    result: dict[str, Any] = {"bits": {}, "cells": {}}
    if args.json.exists() and not args.anew:
        result = with_origins(json.loads(args.json.read_text(encoding="utf-8")))
    result |= {"benchmark": "quality", **report.environment(), "workers": args.workers}
    started, before = time.monotonic(), result.get("seconds", 0.0)
    wanted = [job for job in jobs(args) if not _is_there(result, job)]
    # Each worker has a core to itself; libraries read this when they are imported there.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for job in wanted:
        todo.put(job)
    with TemporaryDirectory(prefix="quality-") as folder:
        workers = []
        for number in range(args.workers):
            workers.append(context.Process(target=work, args=(Path(folder) / str(number), todo, done), daemon=True))
            workers[-1].start()
        left = len(wanted)
        while left:
            try:
                job, found = done.get(timeout=5)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise SystemExit("the workers ended before their work; see above") from None
                if args.limit and time.monotonic() - started > args.limit:
                    report.progress(f"{left} results are left out: the limit of {args.limit:.0f} s is over")
                    break
                continue
            left -= 1
            result["bits" if job[0] == "bits" else "cells"][key(job)] = found | {"origin": origin(result)}
            result["seconds"] = round(before + time.monotonic() - started, 1)
            report.write(args.json, result)
            report.progress(f"{time.monotonic() - started:6.0f} s  {left:3d} left  {key(job)}: {_short(found)}")
            if args.limit and time.monotonic() - started > args.limit:
                report.progress(f"{left} results are left out: the limit of {args.limit:.0f} s is over")
                break
        for worker in workers:
            worker.terminate() if left else worker.join()
    return result


def _is_there(result: dict[str, Any], job: Job) -> bool:
    found = result["bits" if job[0] == "bits" else "cells"].get(key(job))
    return found is not None and "left_out" not in found and "failed" not in found


def _short(found: dict[str, Any]) -> str:
    if problem := found.get("left_out") or found.get("failed"):
        return problem[:160]
    names = ("loss", "score", "other_text_loss", "loss_16bit", "seconds")
    return ", ".join(f"{name} {found[name]:.4g}" for name in names if name in found)


def main() -> None:
    """Measure, then write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; those that it holds are kept")
    parser.add_argument("--page", type=Path, help="a page between whose marks the tables are written at the end")
    parser.add_argument("--tables", type=Path, help="write this page's tables from --json, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="one seed and few variants")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=[variant.name for variant in VARIANTS])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--anew", action="store_true", help="measure again what --json holds")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default 2")
    parser.add_argument(
        "--limit", type=float, default=2400, help="seconds after which no more results are waited for; default 2400"
    )
    args = parser.parse_args()
    if not args.tables:
        measure(args)
    if page := args.tables or args.page:
        from benchmarks.quality_study.page import write_tables

        write_tables(page, json.loads(args.json.read_text(encoding="utf-8")), VARIANTS)


if __name__ == "__main__":
    main()
