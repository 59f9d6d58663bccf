"""Whole folders: `expertune quantize` beside a plain copy of the same files, and loading beside reading them.

    python benchmarks/run.py folders --what quantize --folder FOLDER --layers 6 --json OUT
    python benchmarks/run.py folders --what load --folder FOLDER --json OUT

The source is a Mixtral-8x7B of fewer layers with random 16-bit weights in shards of 5 GB, written into FOLDER unless it
is there. All that is compared starts from the same state of the page cache: files are dropped from it first (`cold`),
or have just been read (`warm`). What is written is flushed to the disk before the clock stops. The copy goes file by
file, and each copy is deleted once it is on the disk, so that the disk has to hold the source once. Every run is a
process of its own; for loading, imports are not counted, and the bytes of mapped files until they are touched are.

A matrix of each layer has to be bitsandbytes' to the byte, and a model's packed weights those of the folder.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.timing import median_ratio, memory_status
from benchmarks.workload import VOCAB_SIZE, Shape
from expertune.checkpoint.reader import INDEX_NAME, open_checkpoint
from expertune.checkpoint.writer import Outgoing, write_tensors

_SHARD_BYTES = 5 * 10**9
_CHUNK = 8 * 2**20
_NOISE = 2**27
_LOADS = ("load_model", "from_pretrained")
_STATES = ("cold", "warm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--what", choices=("quantize", "load"), default="quantize")
    parser.add_argument("--folder", type=Path, help="of source and result; a temporary folder by default")
    parser.add_argument("--layers", type=int, default=3, help="of the source; 2.9 GB each, default 3")
    parser.add_argument("--hidden", type=int, default=4096, help="default 4096")
    parser.add_argument("--intermediate", type=int, default=14336, help="default 14336")
    parser.add_argument("--rounds", type=int, default=2, help="default 2")
    parser.add_argument("--states", nargs="+", choices=_STATES, default=list(_STATES), help="of the cache, for loading")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one, in a process of its own


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure and report.

    Raises:
        CorrectnessError: what was quantized is not what bitsandbytes makes of the source, or a loaded model has other
            packed weights than the folder.
    """
    if args.only:
        print(json.dumps(_ONLY[args.only](args.folder)))
        return None
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = args.folder or Path(scratch)
        source = folder / "source"
        if not (source / INDEX_NAME).is_file():
            shape = Shape(args.hidden, args.intermediate, args.layers, experts=8, top_k=2)
            write_source(source, shape)
        result = _quantize(folder, args.rounds) if args.what == "quantize" else _load(folder, args.rounds, args.states)
    result |= {"layers": json.loads((source / "config.json").read_text())["num_hidden_layers"], **report.environment()}
    if args.json:
        report.write(args.json, result)
    return result


def _quantize(folder: Path, rounds: int) -> dict[str, Any]:
    """Copy and quantize in turns, each from a cold source."""
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "quantize": []}
    for round_ in range(rounds):
        # What is written first leaves the disk busy for the other, so that they take turns.
        for name in sorted(runs, reverse=bool(round_ % 2)):
            runs[name].append(_in_own_process(folder, name))
            report.progress(f"{name}: {runs[name][-1]['seconds']:.1f} s")
    _require_nf4(folder)
    seconds = {name: [each["seconds"] for each in of] for name, of in runs.items()}
    nbytes, written = _nbytes(folder / "source"), _nbytes(folder / "nf4")
    result = {
        "benchmark": "folders",
        "what": "quantize",
        "nbytes": nbytes,
        "nbytes_written": written,
        "bytes_per_second": {name: report.rate(nbytes, times) for name, times in seconds.items()},
        "of_a_copy": median_ratio(seconds["copy"], seconds["quantize"]),
        "peak_rss_bytes": int(max(each["peak_rss_bytes"] for each in runs["quantize"])),
        "cpu_seconds": [each["cpu_seconds"] for each in runs["quantize"]],
        "seconds": seconds,
    }
    rows = [
        [name, f"{median(seconds[name]):.1f}", f"{rate / 1e9:.2f}"] for name, rate in result["bytes_per_second"].items()
    ]
    notes = [
        f"quantizing runs at {result['of_a_copy']:.2f} of a copy's speed, from a cold page cache, flushed to the disk",
        f"peak memory {result['peak_rss_bytes'] / 1e9:.2f} GB, imports included; "
        f"{median(result['cpu_seconds']):.1f} CPU seconds",
    ]
    report.show(f"{nbytes / 1e9:.1f} GB of 16-bit shards", ["", "s", "GB/s of the source"], rows, notes)
    return result


def _load(folder: Path, rounds: int, states: Sequence[str]) -> dict[str, Any]:
    """Read and load in turns, cold and warm."""
    if not (folder / "nf4").is_dir():
        _in_own_process(folder, "quantize")
    names = ["read", *_LOADS]
    runs: dict[str, list[dict[str, float]]] = {f"{state}, {name}": [] for state in states for name in names}
    first = _in_own_process(folder, "first")
    entries = open_checkpoint(folder / "nf4").tensors
    checksum = _checksum({key: entry.read for key, entry in entries.items()})
    for _ in range(rounds):
        for name, of in runs.items():
            of.append(_in_own_process(folder, name))
            report.progress(f"{name}: {of[-1]['seconds']:.2f} s")
            if of[-1].get("checksum", checksum) != checksum:
                raise report.CorrectnessError(f"{name}: the model's packed weights are not those of the folder")
    # Mapped bytes come when they are touched: loading is done when all are there.
    seconds = {name: [each.get("seconds_until_touched", each["seconds"]) for each in of] for name, of in runs.items()}
    result = {
        "benchmark": "folders",
        "what": "load",
        "nbytes": _nbytes(folder / "nf4"),
        "bytes_per_second": {name: report.rate(_nbytes(folder / "nf4"), times) for name, times in seconds.items()},
        # Over reading the same files into one small buffer.
        "of_reading": {
            name: median_ratio(seconds[f"{name.split(',')[0]}, read"], times) for name, times in seconds.items()
        },
        "verified_first_seconds": first["seconds_until_touched"],
        "seconds_until_returned": {name: [each["seconds"] for each in of] for name, of in runs.items()},
        "peak_rss_bytes": {name: int(max(each["peak_rss_bytes"] for each in of)) for name, of in runs.items()},
        "seconds": seconds,
    }
    rows = [
        [
            name,
            f"{median(times):.2f}",
            f"{result['bytes_per_second'][name] / 1e9:.2f}",
            f"{result['of_reading'][name]:.2f}",
        ]
        for name, times in seconds.items()
    ]
    notes = [
        f"the first time on a machine, verified against the manifest and cold: {first['seconds_until_touched']:.2f} s"
    ]
    report.show(f"NF4 folder of {result['nbytes'] / 1e9:.1f} GB", ["", "s", "GB/s", "of reading"], rows, notes)
    return result


def write_source(folder: Path, shape: Shape) -> None:
    """A 16-bit checkpoint with published names, cut into shards as the hub's are."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = (0.02 * torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    nbytes = 0
    for name, sizes in _shapes(shape):
        size = 2 * torch.Size(sizes).numel()
        if nbytes + size > _SHARD_BYTES:
            shards.append({})
            nbytes = 0
        shards[-1][name] = sizes
        nbytes += size
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        outgoing = [
            Outgoing(name, torch.bfloat16, sizes, partial(_random, noise, name, sizes))
            for name, sizes in tensors.items()
        ]
        write_tensors(folder / file, outgoing)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")


def _shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB_SIZE, shape.hidden)
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.block_sparse_moe.gate.weight", (shape.experts, shape.hidden)
        for expert in range(shape.experts):
            for name, sizes in shape.expert().items():
                yield f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight", sizes
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (shape.hidden,)
        for name, sizes in shape.attention().items():
            yield f"{layer}.self_attn.{name}.weight", sizes
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (VOCAB_SIZE, shape.hidden)


def _random(noise: Tensor, name: str, sizes: Sequence[int]) -> Tensor:
    """Other values for each name, without drawing billions of numbers."""
    count = torch.Size(sizes).numel()
    start = zlib.crc32(name.encode()) % (noise.numel() - count + 1)
    return noise[start : start + count].view(tuple(sizes))


def _require_nf4(folder: Path) -> None:
    """A matrix of each layer is what bitsandbytes makes of the source's.

    Raises:
        CorrectnessError: one is not.
    """
    from bitsandbytes.functional import quantize_4bit

    source, made = open_checkpoint(folder / "source"), open_checkpoint(folder / "nf4")
    for key, packed in made.tensors.items():
        if not (found := re.fullmatch(r"model\.layers\.(\d+)\..+\.down\.packed", key)):
            continue
        last = packed.shape[0] - 1
        name = f"model.layers.{found[1]}.block_sparse_moe.experts.{last}.w2.weight"
        theirs, _ = quantize_4bit(source.tensors[name].read(), blocksize=64, quant_type="nf4")
        if not torch.equal(packed.read_part(last).flatten(), theirs.flatten()):
            raise report.CorrectnessError(f"{name} in NF4 is not bitsandbytes'")


def _checksum(tensors: Mapping[str, Callable[[], Tensor]]) -> float:
    """Of the experts' packed weights by name, read one after the other."""
    found = 0
    for name in sorted(name for name in tensors if name.endswith(".packed")):
        found = zlib.crc32(tensors[name]().detach().numpy(), zlib.crc32(name.encode(), found))
    return float(found)


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _in_own_process(folder: Path, name: str) -> dict[str, float]:
    command = [sys.executable, sys.argv[0], "folders", "--folder", str(folder), "--only", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def drop_from_cache(folder: Path) -> None:
    """Leave nothing of a folder's files in the page cache."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(folder: Path) -> dict[str, float]:
    source, out = folder / "source", folder / "copy"
    drop_from_cache(source)
    out.mkdir()
    seconds = 0.0
    for path in sorted(source.iterdir()):
        started = time.perf_counter()
        subprocess.run(["cp", str(path), str(out)], check=True)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())
        seconds += time.perf_counter() - started
        (out / path.name).unlink()
    out.rmdir()
    return {"seconds": seconds}


def _quantize_by_command(folder: Path) -> dict[str, float]:
    source, out = folder / "source", folder / "nf4"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    drop_from_cache(source)
    command = [sys.executable, "-m", "expertune", "quantize", str(source), str(out)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024, "cpu_seconds": cpu}


def _read(folder: Path, cold: bool) -> dict[str, float]:
    """All weights into one buffer that is used again and again: what a disk and its cache can give."""
    buffer = memoryview(bytearray(_CHUNK))
    _set_cache(folder / "nf4", cold)
    started = time.perf_counter()
    for path in sorted((folder / "nf4").glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - started, "peak_rss_bytes": memory_status("VmHWM")}


def _load_by(name: str, folder: Path, cold: bool) -> dict[str, float]:
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401 - what importing takes is not loading

    import expertune

    load = {"load_model": expertune.load_model, "from_pretrained": AutoModelForCausalLM.from_pretrained}[name]
    _set_cache(folder / "nf4", cold)
    started = time.perf_counter()
    model = load(str(folder / "nf4"))
    seconds = time.perf_counter() - started
    # from_pretrained maps the files: its bytes come when they are used.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.view(-1).view(torch.uint8)[::4096].max()
    touched = time.perf_counter() - started
    found = {"seconds": seconds, "seconds_until_touched": touched, "peak_rss_bytes": memory_status("VmHWM")}
    return found | {"checksum": _checksum({name: tensor.cpu for name, tensor in model.state_dict().items()})}


def _set_cache(folder: Path, cold: bool) -> None:
    if cold:
        drop_from_cache(folder)
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _first(folder: Path) -> dict[str, float]:
    """As on a machine that has not seen the folder."""
    os.utime(folder / "nf4" / "config.json")
    return _load_by("load_model", folder, cold=True)


_ONLY = {
    "copy": _copy,
    "quantize": _quantize_by_command,
    "first": _first,
    **{f"{state}, read": partial(_read, cold=state == "cold") for state in _STATES},
    **{f"{state}, {name}": partial(_load_by, name, cold=state == "cold") for state in _STATES for name in _LOADS},
}
