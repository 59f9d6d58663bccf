"""Is the plan's peak an upper bound of what a run takes, and a close one? Real runs, each in a process of its own.

Every run is a `finetune` of a few steps on a model of random weights, by a run file whose examples fill `max_length`,
so that the tokens which the plan counts with are those that run. The highest resident memory (VmHWM) is compared with
the plan of the same run file. The runs are in `plan_runs.py`.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_runs import SHAPES, run_file, write_model, write_questions, write_rows

LEAST_SHARE = 0.75  # of the plan, which a run has to reach; it may never take more than the plan


def measure(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plan a run, run it, and return both peaks, and the highest memory while each part of it ran."""
    from expertune.kernels.threads import prepare_threads

    prepare_threads()  # as the command line, before torch is imported
    from expertune import api
    from expertune.config import parse_config

    phases: dict[str, int] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            phases["elsewhere"] = max(phases.get("elsewhere", 0), _status("VmHWM"))
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _status("VmRSS")
            try:
                return function(*args, **kwargs)
            finally:
                phases[f"{name}, before"] = before
                phases[name] = max(phases.get(name, 0), _status("VmHWM"))

        return call

    for name in ("plan_for", "read_inputs", "load_to_train", "base_forward", "begin_adapter", "preflight", "train"):
        setattr(api, name, watched(name, getattr(api, name)))
    api.HeldOut.score = watched("score", api.HeldOut.score)  # type: ignore[method-assign]
    phases["libraries"] = _status("VmRSS")
    with _watching_the_allocator() as kept:
        run = api.finetune(parse_config(dict(values)))
    phases["elsewhere"] = max(phases["elsewhere"], _status("VmHWM"))
    planned = run.record["plan"]
    peak = max(phases[name] for name in phases)
    return {
        "planned_bytes": planned["memory"]["peak_bytes"],
        "peak_bytes": peak,
        "moment": planned["memory"]["moment"],
        "components": planned["memory"]["components"],
        "phases": phases,
        "allocator_bytes": kept["free_bytes"],
        "routes": run.record["kernels"].get("ran", {}),
    }


class _Mallinfo2(ctypes.Structure):
    """glibc's count of its heaps; `fordblks` are bytes in free blocks."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


@contextmanager
def _watching_the_allocator() -> Iterator[dict[str, int]]:
    """Yields, when closed, what the C allocator kept free at the highest resident memory, sampled (Linux, glibc)."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    highest = {"rss_bytes": 0, "free_bytes": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            if (rss := _status("VmRSS")) > highest["rss_bytes"]:
                highest.update(rss_bytes=rss, free_bytes=mallinfo2().fordblks)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _in_a_process(command: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    return done.stdout


def compare(names: list[str], work: Path, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Run the shapes one after the other; `keep` is called after each with all results so far."""
    rows = work / "rows.jsonl"
    write_rows(rows)
    results = []
    for number, name in enumerate(names):
        shape, folder, output_dir = SHAPES[name], work / f"model-{number}", work / f"run-{number}"
        _in_a_process("--write", name, str(folder))
        if shape.nf4_folder:
            subprocess.run([sys.executable, "-m", "expertune", "quantize", str(folder), f"{folder}-nf4"], check=True)
            shutil.rmtree(folder)
            folder = Path(f"{folder}-nf4")
        if "task" in shape.run:
            write_questions(folder, rows, shape.run["data"]["max_length"])
        values = run_file(shape, folder, rows, output_dir)
        measured = json.loads(_in_a_process("--measure", json.dumps(values)).splitlines()[-1])
        what = {"name": name, "family": shape.family, "model": dict(shape.model), "run": dict(shape.run)}
        results.append({**what, **measured})
        keep(results)
        print(line(results[-1]), flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(output_dir)
    return results


def line(result: Mapping[str, Any]) -> str:
    """A row of the table in docs/performance-details.md."""
    planned, peak = result["planned_bytes"], result["peak_bytes"]
    return (
        f"| {result['name']} | {planned / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {100 * peak / planned:.0f} % "
        f"| {result['moment']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="shapes to run")
    parser.add_argument(
        "--json",
        type=Path,
        help="write everything that was measured here; results of other shapes in it stay",
    )
    parser.add_argument("--work", type=Path, help="folder for models and runs, 8 GB; a temporary one by default")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_model(Path(args.write[1]), SHAPES[args.write[0]])
        return 0
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return 0
    from benchmarks.report import environment

    work = args.work or Path(tempfile.mkdtemp(prefix="plan-accuracy-"))
    work.mkdir(parents=True, exist_ok=True)
    print("| run | planned | measured | of the plan | planned peak |\n|---|---|---|---|---|", flush=True)

    earlier = json.loads(args.json.read_text(encoding="utf-8"))["runs"] if args.json and args.json.exists() else []
    here = environment()

    def keep(results: list[dict[str, Any]]) -> None:
        if args.json:
            new = {result["name"]: {**result, "date": here["date"], "commit": here["commit"]} for result in results}
            runs = {result["name"]: result for result in earlier} | new
            ordered = [runs[name] for name in SHAPES if name in runs]
            args.json.write_text(json.dumps({**here, "runs": ordered}, indent=1) + "\n", encoding="utf-8")

    try:
        results = compare(args.only, work, keep)
    finally:
        if not args.work:
            shutil.rmtree(work)
    shares = {result["name"]: result["peak_bytes"] / result["planned_bytes"] for result in results}
    off = [name for name, share in shares.items() if not LEAST_SHARE <= share <= 1]
    if off:
        print(f"above the plan or below {100 * LEAST_SHARE:.0f} % of it: {', '.join(off)}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
