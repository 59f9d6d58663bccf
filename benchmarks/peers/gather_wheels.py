"""Gather the wheels of Expertune's stack and of its GPU peers for a machine without a network.

    python benchmarks/peers/gather_wheels.py OUT_DIR [--installed FREEZE.txt] [--python 3.12] [--peers unsloth ...]
        [--most-mb 60]

The pins, and why each is there, are in gpu-constraints.txt beside this file. `OUT_DIR` gets the wheels, a requirements
file for each of the two folders that they are installed into (benchmarks/README.md), and manifest.json. Where they are
more than --most-mb, peers are left out, the last named first; nothing is left there where Expertune's own do not fit.
Needs pip and packaging, nothing of the project's own.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

PINS = Path(__file__).with_name("gpu-constraints.txt")
LIMIT_MB = 60
FOLDERS = ("current", "pinned")
EVERY_PEER, OURS = "all", "ours"

# pip matches a platform tag to the letter, so that each one that an ordinary glibc takes has to be named.
_TAGS = "manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010 manylinux1"
PLATFORMS = tuple(f"{tag}_x86_64" for tag in [*_TAGS.split(), "linux"])

# Package -> (what of its wheel is dead weight here, what of that is kept all the same), as patterns of paths.
STRIPPED = {
    "bitsandbytes": (r"bitsandbytes/libbitsandbytes_.*", r".*_(cpu|cuda130)\.so"),
    "unsloth": (r"studio/.*", r""),
}

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)\s+#\s*(?P<rest>.+)")
_LEFT_OUT = re.compile(r"#\s*left out:\s*(?P<rest>.+)")


class GatherError(Exception):
    """The wheels cannot be gathered as asked."""


@dataclass(frozen=True)
class Pin:
    """One line of the constraints file.

    Attributes:
        name: canonical name.
        version: the one version.
        folder: `current` or `pinned`.
        peers: who needs it; (`all`,) for every peer.
        keep: `exact`, `any`, or a range: what the machine's own copy may be.
        reason: why it is there.
    """

    name: str
    version: str
    folder: str
    peers: tuple[str, ...]
    keep: str
    reason: str

    def is_met_by(self, version: str | None) -> bool:
        """Whether a copy of this version (None: one of unknown version) does on the machine."""
        if self.keep == "any":
            return True
        if version is None:
            return False
        accepted = SpecifierSet(f"=={self.version}" if self.keep == "exact" else self.keep)
        return accepted.contains(version, prereleases=True)


@dataclass(frozen=True)
class LeftOut:
    """Packages that a peer names and that are not gathered."""

    names: tuple[str, ...]
    peers: tuple[str, ...]
    reason: str


def read_pins(text: str) -> tuple[list[Pin], list[LeftOut]]:
    """Parse the constraints file.

    Raises:
        GatherError: a line that is none, or a package twice in one folder.
    """
    pins: list[Pin] = []
    left_out: list[LeftOut] = []
    seen: dict[tuple[str, str], int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if match := _LEFT_OUT.fullmatch(line):
            names, peers, reason = _fields(match["rest"], 3, number)
            left_out.append(LeftOut(_words(names), _words(peers), reason))
        elif line and not line.startswith("#"):
            match = _PIN.fullmatch(line)
            if match is None:
                raise GatherError(f"line {number}: expected NAME==VERSION # FOLDER | PEERS | KEEP | why, got {line!r}")
            folder, peers, keep, reason = _fields(match["rest"], 4, number)
            if folder not in FOLDERS:
                raise GatherError(f"line {number}: the folder is {folder!r}, not one of {', '.join(FOLDERS)}")
            pin = Pin(canonicalize_name(match["name"]), match["version"], folder, _words(peers), keep, reason)
            first = seen.setdefault((pin.name, folder), number)
            if first != number:
                raise GatherError(f"line {number}: {pin.name} is in {folder} already, on line {first}")
            pins.append(pin)
    return pins, left_out


def _fields(text: str, num_fields: int, number: int) -> list[str]:
    fields = [field.strip() for field in text.split("|")]
    if len(fields) != num_fields or not all(fields):
        raise GatherError(f"line {number}: expected {num_fields} fields between |, got {text!r}")
    return fields


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def read_installed(text: str) -> dict[str, str | None]:
    """What the machine has, from `pip freeze` or `pip list --format=freeze`: {canonical name: version}.

    A name without a version is a package of unknown version; lines of another kind are passed over.
    """
    installed: dict[str, str | None] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9._-]+)(?:\s*==\s*(\S+)|\s*@\s*\S+)?", line.partition("#")[0].strip()):
            installed[canonicalize_name(match[1])] = match[2]
    return installed


def choose(pins: Iterable[Pin], installed: Mapping[str, str | None], peers: Collection[str]) -> list[Pin]:
    """The pins that these peers need and that the machine has not.

    A pin of `pinned` also stands where the machine's own copy would do but `current`, which lies between the two,
    brings another version.
    """
    wanted = [pin for pin in pins if EVERY_PEER in pin.peers or set(pin.peers) & set(peers)]
    current = {pin.name: pin for pin in wanted if pin.folder == "current"}
    chosen: list[Pin] = []
    for pin in wanted:
        hidden_by = current.get(pin.name) if pin.folder == "pinned" else None
        if hidden_by in chosen or not (pin.name in installed and pin.is_met_by(installed[pin.name])):
            chosen.append(pin)
    return chosen


def rewrite_record(record: str, removed: Collection[str]) -> str:
    """A wheel's RECORD without the lines of removed files, so that pip still finds all that it lists."""
    rows = [row for row in csv.reader(io.StringIO(record)) if row and row[0] not in removed]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def strip_wheel(wheel: Path, unwanted: str, kept: str) -> list[str]:
    """Take files out of a wheel, in place.

    Args:
        wheel: the wheel.
        unwanted: pattern of whole paths to take out.
        kept: pattern of whole paths that stay although `unwanted` matches them.

    Returns:
        The paths that were taken out.
    """
    beside = wheel.with_name(f".{wheel.name}")
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        removed = [name for name in names if re.fullmatch(unwanted, name) and not re.fullmatch(kept, name)]
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as target:
            for info in source.infolist():
                if info.filename in removed:
                    continue
                content = source.read(info)
                if re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename):
                    content = rewrite_record(content.decode("utf-8"), set(removed)).encode("utf-8")
                target.writestr(info, content)
    beside.replace(wheel)
    return removed


Entry = dict[str, Any]
"""A wheel in the manifest: its pin, its file, and what the file is."""


def fit(entries: Sequence[Entry], peers: Sequence[str], most_bytes: float) -> tuple[list[Entry], list[str]]:
    """Leave out peers, the last first, until the wheels of the others fit.

    Args:
        entries: of all wheels that were gathered.
        peers: most valuable first.
        most_bytes: that they may be, each file counted once.

    Returns:
        The entries that are left, and the peers that are.

    Raises:
        GatherError: Expertune's own exceed the limit; the largest wheels are named.
    """
    for count in range(len(peers), -1, -1):
        needed = {EVERY_PEER, OURS, *peers[:count]}
        left = [entry for entry in entries if needed & set(entry["peers"])]
        sizes: dict[str, int] = {entry["file"]: entry["bytes"] for entry in left}
        if sum(sizes.values()) <= most_bytes:
            return left, list(peers[:count])
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
    raise GatherError(
        f"{sum(sizes.values()) / 1e6:.1f} MB of wheels without any peer, {most_bytes / 1e6:.0f} MB allowed; the "
        f"largest: {named}. Say what the machine has with --installed"
    )


def download(pins: Iterable[Pin], folder: Path, python: str) -> None:
    """Have pip fetch the wheels, without their dependencies.

    Raises:
        GatherError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += [f"{pin.name}=={pin.version}" for pin in pins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise GatherError(f"pip could not fetch every wheel: {' '.join(errors) or done.stderr[-1000:]}")


def gather(pins: Iterable[Pin], folder: Path, python: str) -> list[Entry]:
    """Fetch, strip and describe the wheels.

    Returns:
        One entry per wheel for the manifest.

    Raises:
        GatherError: pip failed.
    """
    pins = list(pins)
    for name in FOLDERS:  # a run of pip takes one version of a package
        if here := [pin for pin in pins if pin.folder == name]:
            download(here, folder, python)
    wheels = {(str(name), str(version)): path for path, name, version in _wheels(folder)}
    entries: list[Entry] = []
    for pin in pins:
        path = wheels[pin.name, pin.version]
        removed = strip_wheel(path, *STRIPPED[pin.name]) if pin.name in STRIPPED else []
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stripped = {"files_stripped": len(removed)} if removed else {}
        entries.append({**asdict(pin), "file": path.name, "bytes": path.stat().st_size, "sha256": digest, **stripped})
    return entries


def _wheels(folder: Path) -> list[tuple[Path, str, str]]:
    found = []
    for path in folder.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(path.name)
        found.append((path, str(name), str(version)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--installed", type=Path, metavar="FREEZE.txt", help="`pip freeze` of the GPU machine")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python; default 3.12")
    parser.add_argument("--peers", nargs="+", help="for these and ours, most valuable first; default: for all")
    parser.add_argument("--most-mb", type=float, default=LIMIT_MB, help=f"of wheels; default {LIMIT_MB}")
    args = parser.parse_args(arguments)
    try:
        print(_gather_into(args))
    except (GatherError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _gather_into(args: argparse.Namespace) -> str:
    out: Path = args.out_dir
    if out.exists() and any(out.iterdir()):
        raise GatherError(f"{out} is not empty; name a new folder")
    pins, left_out = read_pins(PINS.read_text(encoding="utf-8"))
    known = [peer for peer in dict.fromkeys(p for pin in pins for p in pin.peers) if peer not in (EVERY_PEER, OURS)]
    asked = [peer for peer in dict.fromkeys(args.peers or known) if peer != OURS]
    if unknown := set(asked) - set(known):
        raise GatherError(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    installed = read_installed(args.installed.read_text(encoding="utf-8")) if args.installed else {}
    chosen = choose(pins, installed, {OURS, *asked})

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        entries, peers = fit(gather(chosen, beside, args.python), asked, args.most_mb * 1e6)
        for path in beside.glob("*.whl"):
            if path.name not in {entry["file"] for entry in entries}:
                path.unlink()
        for folder in FOLDERS:
            lines = [f"{entry['name']}=={entry['version']}\n" for entry in entries if entry["folder"] == folder]
            (beside / f"requirements-{folder}.txt").write_text("".join(lines), encoding="utf-8")
        manifest = {
            "python": args.python,
            "peers": peers,
            "peers_left_out": [peer for peer in asked if peer not in peers],
            "total_bytes": sum(wheel.stat().st_size for wheel in beside.glob("*.whl")),
            "most_bytes": int(args.most_mb * 1e6),
            "wheels": entries,
            "on_the_machine": sorted({pin.name for pin in pins} & set(installed)),
            "left_out": [asdict(entry) for entry in left_out],
        }
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        beside.chmod(0o755)  # a temporary folder is its maker's alone
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    said = f"{out}: {len(entries)} wheels, {manifest['total_bytes'] / 1e6:.1f} MB of {args.most_mb:g} MB"
    return f"{said}; no room for {', '.join(without)}" if (without := manifest["peers_left_out"]) else said


if __name__ == "__main__":
    sys.exit(main())
