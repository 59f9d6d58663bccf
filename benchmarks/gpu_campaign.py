"""Everything that one GPU is measured for, most valuable first: `python benchmarks/gpu_campaign.py --minutes 8`.

Never takes longer than it is given. Each group of items is a process that writes OUT/GROUP.json after every item, so
that what is measured survives the failure of what comes next; what had no time is listed with what it would have
needed. On a machine without a GPU, `--device cpu --small` runs the same code on small shapes.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from benchmarks.campaign import schedule, variants
from benchmarks.campaign.schedule import Group

_STARTED = time.monotonic()
_ROOT = Path(__file__).resolve().parents[1]
_MOST_INSTALL_S = 120.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything, start included; default 8")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the JSON; default build/gpu")
    parser.add_argument("--archive", type=Path, help="one .tar.gz of all JSON and logs, written anew after each group")
    parser.add_argument("--groups", nargs="+", metavar="WORD", help="only those whose names begin so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--wheels", type=Path, help="folder of benchmarks/peers/gather_wheels.py; installed beside it")
    parser.add_argument("--text", type=Path, help="JSONL rows in dolly's layout; default: those of benchmarks/data")
    parser.add_argument("--alpaca", type=Path, help="rows in alpaca's layout, for Qwen3; default: those of --text")
    parser.add_argument("--peers", nargs="*", default=["experts4bit", "unsloth"], help="whole stacks beside ours")
    parser.add_argument("--peer-layers", type=int, default=12, help="depth at which they are compared")
    parser.add_argument("--cache", type=Path, help="where the peers' checkpoint is kept; default: removed afterwards")
    parser.add_argument("--report", type=Path, metavar="OUT", help="show the targets against what OUT's JSON says")
    parser.add_argument("--page", type=Path, help="with --report: write the block of this page, if measured on a GPU")
    parser.add_argument("--here", metavar="GROUP", help="measure one group in this process")
    parser.add_argument("--campaign", default="", help="with --here: whose group it is")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="with --here: no item is begun after this time"
    )
    return parser.parse_args(arguments)


def groups_of(args: argparse.Namespace) -> list[Group]:
    """What is measured, most valuable first, with what it takes on an H100; what is timed runs alone."""
    device, dtypes = args.device, ("bfloat16", "float32", "float16") if args.device == "cuda" else ("bfloat16",)
    checks = [f"self-check {dtype}" for dtype in dtypes]
    routes = [variants.group_of(variant) for variant in variants.VARIANTS[device]]

    def group(name: str, needs_s: float, limit_s: float, **settings: Any) -> Group:
        return Group(
            name, (sys.executable, str(Path(__file__).resolve()), *_passed_on(args, name)), needs_s, limit_s, **settings
        )

    found = [
        *(group(name, 60, 120) for name in (*checks[:2], *routes, variants.DECODING, *checks[2:])),
        # After the checks that its commands would each make again; on a CPU these are one after the other.
        group("product", 130, 150 if device == "cuda" else 300, after=tuple(checks[:2])),
        group("mixtral", 70, 120, alone=True),
        group("expert layer", 110, 130, alone=True),
        group("qwen3", 70, 90, alone=True),
        group("sweep", 100, 150, alone=True),
        group("mixtral, other sizes", 80, 120, alone=True),
        group("placement", 300, 400, alone=True),
        group("peers", 400, 500, alone=True),
    ]
    if device == "cuda":  # in what the checks leave of the cores
        found[-7:-7] = [group(f"compiled {shape}", 100, 130, niceness=10) for shape in ("mixtral", "qwen3")]
    words = args.groups or [""]
    return [one for one in found if any(one.name.startswith(word) for word in words)]


def measured_by(args: argparse.Namespace, name: str) -> Callable[[Any], None]:
    """What measures a group, given its record; imports what this group needs, which is most of its start."""
    first, _, rest = name.partition(" ")
    usual, large = ((64, 128), (320,)) if args.small else ((2048, 320), (8192, 1280))

    def of(module: str) -> Any:
        return importlib.import_module(f"benchmarks.campaign.{module}")

    known: dict[str, Callable[[Any], None]] = {
        variants.DECODING: lambda out: of("correctness").decoding(args, out),
        "product": lambda out: of("product").run(args, out),
        "mixtral": lambda out: of("steps").mixtral(args, out, usual),
        "mixtral, other sizes": lambda out: of("steps").mixtral(args, out, large),
        "expert layer": lambda out: of("expert_layer").run(args, out),
        "qwen3": lambda out: of("steps").qwen(args, out),
        "sweep": lambda out: of("sweep").run(args, out),
        "placement": lambda out: of("placement").run(args, out),
        "peers": lambda out: of("peers").run(args, out),
    }
    families: dict[str, Callable[[Any], None]] = {
        "self-check": lambda out: of("correctness").self_check(args, out, rest),
        "correct": lambda out: of("correctness").route(args, out, rest),
        "compiled": lambda out: of("expert_layer").compile_ahead(args, out, rest),
    }
    return known.get(name) or families[first]


def measure_here(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One group in this process; what its JSON holds."""
    if args.small and args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread only waits, on shapes this small
    import torch

    from benchmarks.campaign.record import Record, describe, environment
    from benchmarks.workload import DOLLY_SAMPLE

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --device cpu --small makes a dry run")
    args.text = args.text or DOLLY_SAMPLE
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    about = {"campaign": args.campaign} | environment(device)
    out = Record(schedule.path_of(args.out, name), name, args.until, device, args.small, about)
    try:
        measured_by(args, name)(out)
    except (Exception, SystemExit) as error:
        out.values["errors"][name] = describe(error)
        out.write()
        raise
    out.finish()
    return out.values


def main() -> int:
    """Run the campaign, or show what there is."""
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started does not outlive this process
    if args.wheels is not None:
        if args.report is None and args.here is None:
            install(args.wheels, _STARTED + 60 * args.minutes)
        use(args.wheels)
    find_first(_ROOT / "src")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing waits for a network that is not there
    if args.report is not None:
        from benchmarks.campaign import targets

        targets.show(args.report)
        if args.page is not None:
            targets.write_page(args.page, args.report)
        return 0
    if args.here is not None:
        measure_here(args.here, args)
        return 0
    describe_package(args.out / "package")
    # Checks side by side leave a core to their commands; on a CPU each process takes all cores.
    workers = max((os.cpu_count() or 2) - 4, 1) if args.device == "cuda" else 1
    try:
        summary = schedule.run(groups_of(args), args.out, _STARTED + 60 * args.minutes, workers, args.archive)
    except KeyboardInterrupt:
        schedule.progress(f"interrupted; what was measured is in {args.out}")
        return 130
    wrong = variants.gate(args.out, args.device)["failed"]
    left_out = [f"{route}: left out, because of {', '.join(checks)}" for route, checks in wrong.items()]
    print(*schedule.lines(summary), *left_out, sep="\n")
    shown = ["--report", str(args.out), *(["--wheels", str(args.wheels)] if args.wheels else [])]
    print(f"{summary['seconds']:.0f} s; python benchmarks/gpu_campaign.py {shlex.join(shown)} shows the targets")
    return 0 if schedule.is_sound(summary) and not wrong else 1


def install(wheels: Path, end: float) -> None:
    """Install the wheels into folders of their own beside them; those of the peers may stay out where they fail.

    Args:
        wheels: folder of `benchmarks/peers/gather_wheels.py`.
        end: of the campaign, by `time.monotonic`.

    Raises:
        SystemExit: what every process needs cannot be installed.
    """
    current, without_peers, pinned = _folders(wheels)
    if not _installed(wheels, current, _required(wheels, "current"), end) and not without_peers.exists():
        schedule.progress(f"{current}: going on without the peers' packages")
        entries = json.loads((wheels / "manifest.json").read_text(encoding="utf-8"))["wheels"]
        own = [entry for entry in entries if entry["folder"] == "current" and {"all", "ours"} & set(entry["peers"])]
        needed = [f"{entry['name']}=={entry['version']}" for entry in own]
        if not _installed(wheels, without_peers, needed, end):
            raise SystemExit(f"the wheels of {wheels} cannot be installed; pip says above why")
    if not _installed(wheels, pinned, _required(wheels, "pinned"), end):  # of peers alone
        schedule.progress(f"{pinned}: going on without the peers that need it")


def use(wheels: Path) -> None:
    """Have this process and those that it starts find what `install` has left."""
    current, without_peers, pinned = _folders(wheels)
    find_first(current if current.exists() else without_peers)
    os.environ["EXPERTUNE_PINNED_PACKAGES"] = str(pinned)


def find_first(folder: Path) -> None:
    """Have this process and those that it starts look for packages here first."""
    sys.path.insert(0, str(folder))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def describe_package(folder: Path) -> None:
    """Have processes know the checkout's version, which it has only once it was installed, and a copy may not."""
    try:
        importlib.metadata.version("expertune")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
        info = folder / f"{project['name']}-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
        find_first(folder.resolve())


def _folders(wheels: Path) -> list[Path]:
    return [wheels.resolve().parent / name for name in ("current", "current-without-peers", "pinned")]


def _required(wheels: Path, name: str) -> list[str]:
    return (wheels / f"requirements-{name}.txt").read_text(encoding="utf-8").split()


def _installed(wheels: Path, folder: Path, required: list[str], end: float) -> bool:
    """Whether the folder has what is required, now or before; it is filled beside and renamed."""
    if folder.exists() or not required:
        return True
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--find-links", str(wheels), "--target", str(beside), *required]
    try:
        subprocess.run(command, check=True, timeout=max(min(_MOST_INSTALL_S, end - time.monotonic()), 1))
    except subprocess.SubprocessError as error:
        schedule.progress(f"{folder}: {error}")
        shutil.rmtree(beside, ignore_errors=True)
        return False
    beside.rename(folder)
    return True


def _passed_on(args: argparse.Namespace, name: str) -> list[str]:
    """The command line of a group's own process."""
    words = ["--here", name]
    for key in ("out", "device", "small", "text", "alpaca", "peers", "peer_layers", "cache"):
        option, value = f"--{key.replace('_', '-')}", getattr(args, key)
        if value is None or value is False:
            continue
        words += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    return words


if __name__ == "__main__":
    sys.exit(main())
