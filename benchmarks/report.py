"""What a benchmark leaves: JSON with everything that decides its figures, and a table for the eye."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.processes import ROOT
from expertune.kernels.cpu import cpu_instruction_sets, gemm_dtype
from expertune.kernels.processor import cpu_name
from expertune.storage import write_whole

_PACKAGES = ("expertune", "torch", "transformers", "peft", "bitsandbytes")


class CorrectnessError(Exception):
    """Stacks that should compute the same do not: their speeds cannot be compared."""


def environment() -> dict[str, Any]:
    """Device, versions, commit, command and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": cpu_name(),
        "instruction_sets": list(cpu_instruction_sets()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "command": shlex.join(["python", *map(_portable, sys.argv)]),
    }


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """`--dtype` of the products: named, of all stacks; `auto`, of each in what it does best on this machine."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the products; auto: bfloat16, on a CPU that cannot multiply it float32; peers in what is faster there",
    )


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that `--dtype` means on a device."""
    return gemm_dtype(torch.bfloat16, torch.device(device)) if name == "auto" else getattr(torch, name)


def dtypes_of_peers(name: str, device: str) -> list[torch.dtype]:
    """The dtypes that a peer is tried in where `--dtype` leaves the choice: those that this machine multiplies."""
    chosen = resolve_dtype(name, device)
    both = name == "auto" and device == "cpu" and chosen != torch.float32
    return [chosen, torch.float32] if both else [chosen]


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rate(amount: int, seconds: Sequence[float]) -> float:
    """Amount per second, at the median."""
    return amount / statistics.median(seconds)


def progress(line: str) -> None:
    """Say on stderr what is being done."""
    print(line, file=sys.stderr, flush=True)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_own(path: Path) -> dict[str, Any] | None:
    """A result that was begun on this machine, to go on with; None where there is none.

    Raises:
        SystemExit: it is another machine's.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (device := result["device"]) != cpu_name():
        raise SystemExit(f"{path} is of {device}, and this machine of {cpu_name()}; name another file")
    return result


def write_block(page: Path, mark: str, lines: Iterable[str]) -> None:
    """Write what stands between a page's `<!-- mark -->` and `<!-- /mark -->` anew.

    Raises:
        SystemExit: the page has lost a mark; it stays as it was.
    """
    text = page.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"{page}: the marks <!-- {mark} --> and <!-- /{mark} --> are gone")
    body = "\n".join(lines) + "\n"
    with write_whole(page) as file:
        file.write(block.sub(lambda found: found[1] + body + found[2], text).encode())


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print a table and, below it, what has to be known to read it."""
    console = Console()
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", soft_wrap=True, highlight=False)


def _commit() -> str:
    """The commit, marked where files that were measured differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    # A copy of the checkout may be without its history.
    if told := os.environ.get("EXPERTUNE_COMMIT"):
        return told

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return (git("rev-parse", "HEAD") or "unknown") + ("+changes" if changed else "")


def _portable(argument: str) -> str:
    """A path as seen from the checkout, so that a command can be repeated elsewhere; `OUT` for one outside of it."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute() and ".." not in path.parts:
        return argument
    path = Path(os.path.normpath(Path.cwd() / path))
    return f"{option}{equals}{path.relative_to(ROOT) if path.is_relative_to(ROOT) else 'OUT'}"
