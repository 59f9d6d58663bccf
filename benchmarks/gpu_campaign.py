"""Everything that one GPU is measured for, in stages: `python benchmarks/gpu_campaign.py --stages 1 2 --out OUT`.

Each stage runs in a process of its own and writes OUT/stageN.json after every item, so that what one stage leaves
survives the failure of the next. On a machine without a GPU, `--device cpu --small` runs the same code on small shapes.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import report
from benchmarks.campaign import (
    stage0_product,
    stage1_correctness,
    stage2_layer,
    stage3_mixtral,
    stage4_qwen,
    stage5_placement,
    sweep,
    targets,
)
from benchmarks.campaign.record import Record, describe
from benchmarks.workload import DOLLY_SAMPLE

STAGES: dict[str, ModuleType] = {
    "0": stage0_product,
    "1": stage1_correctness,
    "2": stage2_layer,
    "3": stage3_mixtral,
    "4": stage4_qwen,
    "5": stage5_placement,
    "sweep": sweep,
}

# What a process has beyond its limit for the item that it is in, before it is ended.
_GRACE_S = 60


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=[], help="which, in the order given")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the JSON; default build/gpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--limit", type=float, help="seconds of each stage; default: the stage's own")
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument("--alpaca", type=Path, help="rows in alpaca's layout, for stage 4; default: those of --text")
    parser.add_argument("--peers", nargs="*", default=["experts4bit", "unsloth"], help="of stage 4")
    parser.add_argument("--peer-layers", type=int, default=12, help="depth at which stage 4's peers are compared")
    parser.add_argument(
        "--cache",
        type=Path,
        help="where stage 4 keeps the peers' checkpoint; default: the temporary folder, removed afterwards",
    )
    parser.add_argument("--report", type=Path, metavar="OUT", help="show the targets against what OUT's JSON says")
    parser.add_argument("--page", type=Path, help="with --report: write the block of this page, if measured on a GPU")
    parser.add_argument("--here", action="store_true", help="run the stages in this process")
    return parser.parse_args(arguments)


def run_stage(name: str, args: argparse.Namespace) -> Record:
    """One stage in this process."""
    stage = STAGES[name]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --device cpu --small makes a dry run")
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    if args.small and args.device == "cpu":
        torch.set_num_threads(1)  # a second thread only waits, on shapes this small
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = Record(path_of(args.out, name), name, args.limit or stage.LIMIT_S, device, args.small)
    try:
        stage.run(args, out)
    except (Exception, SystemExit) as error:
        out.values["errors"]["stage"] = describe(error)
        raise
    finally:
        out.write()
    out.finish()
    return out


def path_of(folder: Path, name: str) -> Path:
    """A stage's JSON."""
    return folder / (f"stage{name}.json" if name.isdigit() else f"{name}.json")


def main() -> int:
    """Run the stages that were asked for, then show what there is."""
    args = parse()
    failed = []
    for name in args.stages:
        report.progress(f"--- stage {name}")
        started = time.monotonic()
        if args.here:
            run_stage(name, args)
        elif not _in_a_process(name, args):
            failed.append(name)
        report.progress(f"--- stage {name}: {time.monotonic() - started:.0f} s")
    folder = args.report or (args.out if args.stages and not args.here else None)
    if folder is not None:
        targets.show(folder)
        if args.page is not None:
            targets.write_page(args.page, folder)
    return 1 if failed else 0


def _in_a_process(name: str, args: argparse.Namespace) -> bool:
    """Run a stage apart, so that a fault of the device or a hang ends nothing but the stage."""
    skipped = {"--stages", "--here"}
    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--stages", name]
    values = vars(args) | {"limit": args.limit or STAGES[name].LIMIT_S}
    for key, value in values.items():
        option = f"--{key.replace('_', '-')}"
        if option in skipped or key in ("report", "page") or value is None or value is False:
            continue
        command += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    process = subprocess.Popen(command)
    try:
        return process.wait(timeout=values["limit"] + _GRACE_S) == 0
    except subprocess.TimeoutExpired:
        report.progress(f"stage {name} is over its limit and is ended; its JSON has what was measured")
        process.kill()
        process.wait()
        return False


if __name__ == "__main__":
    sys.exit(main())
