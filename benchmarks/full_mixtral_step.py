"""One optimizer step of Mixtral-8x7B at full size on a CPU, its experts on disk: seconds, peak resident memory, loss.

    python benchmarks/full_mixtral_step.py --json OUT [--tokens 2048] [--dtype bfloat16]

Writes an NF4 folder of the published shape (32 layers, 46.7 billion parameters, 24 GB) with random weights straight to
disk, unless it is there, and runs one step of the recipe's adapters on the tokens of real rows through
`expertune.api.finetune`: plan, data, load, attach, preflight check, train, save. `seconds` is the step (forward,
backward and optimizer), `preflight_seconds` the check and what is tried of the model before it, and `run_seconds` is
all of it. `disk_read_bytes` is what the run has read that was not in the page cache. Each part is a process of its own,
so that the peak is the run's alone.
"""

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.workload import DOLLY_SAMPLE, TOKENIZER, Shape
from expertune.checkpoint.formats.nf4_folder import FOLDER_MARK, FORMAT_VERSION, METHOD, REST
from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.nf4_linears import quantized_linear
from expertune.checkpoint.recipe import linears_to_quantize
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.config import QuantizationConfig
from expertune.experts.module import Nf4Experts
from expertune.storage import hash_file, write_json

MIXTRAL = Shape(hidden=4096, intermediate=14336, layers=32, experts=8, top_k=2)
TOKENS = 320
_LONGEST_ROW = 320
_STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--folder", type=Path, help="where the 24 GB are written and kept; default: temporary")
    parser.add_argument("--layers", type=int, default=MIXTRAL.layers, help="fewer than 32, to try the script")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the step: rows of up to 320, of equal length")
    parser.add_argument("--dtype", default="auto", help="`quantization.compute_dtype` of the run file")
    parser.add_argument("--delete", action="store_true", help="delete the folder at the end")
    parser.add_argument("--part", choices=("write", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.gettempdir()) / f"expertune-mixtral-nf4-{args.layers}"
    if args.part == "write":
        write_folder(folder, replace(MIXTRAL, layers=args.layers))
        return
    if args.part == "run":
        print(json.dumps(run_step(folder, args.tokens, args.dtype)))
        return
    own = [sys.executable, __file__, "--folder", str(folder), "--layers", str(args.layers)]
    own += ["--tokens", str(args.tokens), "--dtype", args.dtype]
    if not (folder / FOLDER_MARK).is_file():
        subprocess.run([*own, "--part", "write"], check=True)
    said = subprocess.run([*own, "--part", "run"], check=True, stdout=subprocess.PIPE, text=True).stdout
    result = {**json.loads(said.splitlines()[-1]), "layers": args.layers, **report.environment()}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)
    if args.delete:
        shutil.rmtree(folder)


def run_step(folder: Path, tokens: int = TOKENS, dtype: str = "auto") -> dict[str, Any]:
    """The run, in this process."""
    from expertune.api import finetune
    from expertune.config import parse_config

    started, read_before = time.perf_counter(), _disk_read_bytes()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        values = run_values(folder, Path(scratch), tokens) | {"quantization": {"compute_dtype": dtype}}
        record = finetune(parse_config(values)).record
    values = record.values
    return {
        "seconds": round(values["throughput"]["tokens"] / values["throughput"]["tokens_per_second"], 2),
        "preflight_seconds": values["run"]["phases"]["preflight"],
        "preflight": {name: values["preflight"][name] for name in ("learning", "effective", "seconds")},
        "run_seconds": round(time.perf_counter() - started, 1),
        "disk_read_bytes": _disk_read_bytes() - read_before,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "planned_peak_bytes": values["plan"]["memory"]["peak_bytes"],
        "loss": values["train"]["loss"][0][1],
        "compute_dtype": dtype,
        "tokens": values["throughput"]["tokens"],
        "parameters": values["plan"]["parameters"],
        "placement": values["placement"],
        "kernels": values["kernels"],
        "total_memory_bytes": psutil.virtual_memory().total,
    }


def run_values(folder: Path, scratch: Path, tokens: int = TOKENS, steps: int = 1) -> dict[str, Any]:
    """The run file's values; its rows and its run are written into `scratch`."""
    num_rows = next(count for count in range(-(-tokens // _LONGEST_ROW), tokens + 1) if tokens % count == 0)
    return {
        "model": str(folder),
        "data": {
            "train": str(_long_rows(scratch, num_rows)),
            "format": "dolly",
            "template": "dolly-tutorial",
            "max_length": tokens // num_rows,
            "train_on": "all",
        },
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05, "targets": ["attention", "experts", "lm_head"]},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": num_rows,
            "gradient_checkpointing": True,
            "learning_rate": 2.5e-5,
            "save_strategy": "no",
        },
        "placement": "disk",
        "output_dir": str(scratch / "run"),
    }


def write_folder(folder: Path, shape: Shape) -> None:
    """An NF4 folder of a Mixtral with random weights, a tensor at a time; nothing is quantized but attention."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config()
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in TOKENIZER.iterdir():
        if path.suffix == ".gz":
            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copy(path, folder / path.name)
    settings = QuantizationConfig()
    model = build_meta_model(folder, torch.bfloat16)
    specs = read_names(model).specs
    linears = set(linears_to_quantize(model, specs))
    random = np.random.Generator(np.random.SFC64(0))
    files, weight_map = {}, {}
    layers = list(decoder_layers(model, specs))
    for number, (name, layer) in enumerate(layers):
        file = f"layer-{number:05d}.safetensors"
        outgoing = list(_layer_tensors(name, layer, set(specs), linears, settings, random))
        files[file] = write_tensors(folder / file, outgoing)
        weight_map |= {tensor.name: file for tensor in outgoing}
        print(f"{file}: {files[file].nbytes / 1e9:.2f} GB", file=sys.stderr)
    inside = tuple(f"{name}." for name, _ in layers)
    rest = [
        _random_weight(name, parameter, random)
        for name, parameter in model.named_parameters()
        if not name.startswith(inside)
    ]
    files[REST] = write_tensors(folder / REST, rest)
    weight_map |= {tensor.name: REST for tensor in rest}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": METHOD}})
    others = ("config.json", "model.safetensors.index.json")
    records = files | {name: hash_file(folder / name) for name in others}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": {"model": "random weights"},
        "quantization": {"scheme": "nf4"} | settings.model_dump(include={"double_quantization", "block_size"}),
        "files": {name: {"sha256": record.sha256, "bytes": record.nbytes} for name, record in records.items()},
    }
    write_json(folder / FOLDER_MARK, manifest)


def _layer_tensors(
    name: str,
    layer: nn.Module,
    experts: set[str],
    linears: set[str],
    settings: QuantizationConfig,
    random: np.random.Generator,
) -> Iterator[Outgoing]:
    for path, module in list(layer.named_modules(prefix=name)):
        if path in experts:
            swapped = Nf4Experts(module, path, settings.double_quantization, "meta")
            for stack in ("gate_up", "down"):
                for buffer, held in swapped.get_submodule(stack).state_dict().items():
                    yield _random_bytes(f"{path}.{stack}.{buffer}", held, random)
        elif path in linears:
            quantized = _random_linear(module, settings, random)
            state = quantized.weight.quant_state.as_dict(packed=True)
            tensors = {f"{path}.weight": quantized.weight.data} | {
                f"{path}.weight.{key}": value for key, value in state.items()
            }
            for key, value in tensors.items():
                yield Outgoing(key, value.dtype, tuple(value.shape), lambda value=value: value)
        elif not any(path.startswith(f"{other}.") for other in experts):
            for leaf, parameter in module.named_parameters(recurse=False):
                yield _random_weight(f"{path}.{leaf}", parameter, random)


def _random_bytes(name: str, held: Tensor, random: np.random.Generator) -> Outgoing:
    """Codes at random; scales around those of weights with a standard deviation of 0.02."""

    def read() -> Tensor:
        if held.dtype == torch.uint8:
            words = random.integers(0, 2**64, size=-(-held.numel() // 8), dtype=np.uint64)
            return torch.from_numpy(words.view(np.uint8)[: held.numel()]).view(held.shape)
        return torch.full(held.shape, _STD * (2.5 if name.endswith("offset") else 0.5))

    return Outgoing(name, held.dtype, tuple(held.shape), read, aligned=True)


def _random_linear(linear: nn.Linear, settings: QuantizationConfig, random: np.random.Generator) -> nn.Module:
    weight = random.standard_normal((linear.out_features, linear.in_features), dtype=np.float32) * _STD
    return quantized_linear(
        linear, torch.from_numpy(weight), settings.double_quantization, torch.bfloat16, torch.device("cpu")
    )


def _random_weight(name: str, parameter: Tensor, random: np.random.Generator) -> Outgoing:
    def read() -> Tensor:
        if "norm" in name:
            return torch.ones(parameter.shape, dtype=parameter.dtype)
        values = torch.from_numpy(random.standard_normal(tuple(parameter.shape), dtype=np.float32))
        return (values * _STD).to(parameter.dtype)

    return Outgoing(name, parameter.dtype, tuple(parameter.shape), read)


def _long_rows(folder: Path, num_rows: int) -> Path:
    """The longest rows of the sample, in a file of their own: the longest has more than 320 tokens, eight have 256."""
    rows = DOLLY_SAMPLE.read_text(encoding="utf-8").splitlines()
    path = folder / "rows.jsonl"
    path.write_text("\n".join(sorted(rows, key=len, reverse=True)[:num_rows]) + "\n", encoding="utf-8")
    return path


def _disk_read_bytes() -> int:
    """What this process has had read from disk."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
