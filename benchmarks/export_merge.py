"""Merge an adapter into 16-bit shards of Mixtral's shape: bytes per second beside a plain copy, and peak memory.

The peak is also taken of an adapter of Mixtral-8x7B's own size: all of its factors are read as a merge reads them, and
one layer is merged, of a checkpoint whose files have the right headers and nothing in them.
"""

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import MixtralConfig

from benchmarks import report
from benchmarks.timing import median_ratio
from expertune.adapt.factors import PREFIX
from expertune.adapt.files import Origin, stock_config, write_adapter
from expertune.adapt.layout_trial import StockLayout
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.reader import open_checkpoint
from expertune.checkpoint.writer import Outgoing
from expertune.config import parse_config
from expertune.exporting.additions import find_additions
from expertune.exporting.merged import Merged
from expertune.exporting.merging import merge_shard
from expertune.exporting.opening import read_source
from expertune.exporting.source import ExportSource
from expertune.run.context import RunContext
from expertune.run.progress import Bars
from expertune.run.record import RunRecord

RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=3, help="default 3, 2.4 GB")
    parser.add_argument("--rounds", type=int, default=4, help="default 4")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--only", choices=("copy", "merge", "full"), help=argparse.SUPPRESS
    )  # one, in a process of its own


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: a merged weight is not that of base and adapter.
    """
    if args.only:
        return _measure(args.folder, args.only)
    with TemporaryDirectory(prefix="export-merge-", dir=args.folder) as scratch:
        folder = Path(scratch)
        write_model(folder / "model", args.layers)
        write_random_adapter(folder / "model", folder / "adapter")
        nbytes = sum(shard.stat().st_size for shard in (folder / "model").glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {"copy": [], "merge": []}
        for round_ in range(args.rounds):
            # What is written first leaves the disk busy for the other, so that they take turns.
            for name in sorted(found, reverse=bool(round_ % 2)):
                found[name].append(_in_own_process(folder, name))
        _require_merged(folder)
        write_full_size(folder / "full")
        full = _in_own_process(folder / "full", "full")
    seconds = {name: [each["seconds"] for each in measured] for name, measured in found.items()}
    result = {
        "benchmark": "export_merge",
        "nbytes": nbytes,
        "rank": RANK,
        "bytes_per_second": {name: report.rate(nbytes, times) for name, times in seconds.items()},
        "of_a_copy": median_ratio(seconds["copy"], seconds["merge"]),
        "peak_rss_bytes": int(max(each["peak_rss_bytes"] for each in found["merge"])),
        "mixtral_8x7b": {
            "adapter_bytes": int(full["adapter_bytes"]),
            "peak_rss_bytes": int(full["peak_rss_bytes"]),
            "imports_rss_bytes": int(full["imports_rss_bytes"]),
        },
        "seconds": seconds,
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [[name, f"{rate / 1e9:.2f}"] for name, rate in result["bytes_per_second"].items()]
    report.show(
        f"{nbytes / 1e9:.2f} GB of 16-bit shards on {result['device']}, {result['threads']} threads",
        ["", "GB/s"],
        rows,
        [
            f"a merge runs at {result['of_a_copy']:.2f} of a plain copy's speed; both are flushed to the disk",
            f"peak memory of the merge {result['peak_rss_bytes'] / 1e9:.2f} GB, imports included",
            f"with Mixtral-8x7B's adapter, {full['adapter_bytes'] / 1e9:.2f} GB: {full['peak_rss_bytes'] / 1e9:.2f} GB",
        ],
    )
    return result


def write_model(folder: Path, num_layers: int) -> None:
    """A checkpoint with published names, a shard for each half of a layer's experts, which all have the same values."""
    config = MixtralConfig(
        hidden_size=2048, intermediate_size=7168, num_hidden_layers=num_layers, num_attention_heads=16, dtype="bfloat16"
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    up = (0.02 * torch.randn(7168, 2048)).bfloat16()
    head, square = up.repeat(5, 1)[:32000].contiguous(), up[:2048].contiguous()
    shards: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": head, "lm_head.weight": head.clone()}]
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        attention = {f"{at}.self_attn.{name}_proj.weight": square.clone() for name in "qo"}
        attention |= {f"{at}.self_attn.{name}_proj.weight": square[:1024].clone() for name in "kv"}
        norms = {f"{at}.{name}_layernorm.weight": torch.ones(2048).bfloat16() for name in ("input", "post_attention")}
        gate = {f"{at}.block_sparse_moe.gate.weight": square[:8].clone()}
        for half in (range(4), range(4, 8)):
            experts = {}
            for expert in half:
                name = f"{at}.block_sparse_moe.experts.{expert}"
                experts |= {f"{name}.w1.weight": up.clone(), f"{name}.w3.weight": up.clone()}
                experts[f"{name}.w2.weight"] = up.T.contiguous()
            shards.append(experts | (attention | norms | gate if 0 in half else {}))
    shards[0]["model.norm.weight"] = torch.ones(2048).bfloat16()
    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}
    for file, shard in files.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, shard in files.items() for key in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_full_size(folder: Path) -> None:
    """Mixtral-8x7B's config, a file for each layer that is a header and a hole, and an adapter."""
    config = MixtralConfig(dtype="bfloat16", architectures=["MixtralForCausalLM"])
    config.save_pretrained(folder / "model")
    described = build_meta_model(folder / "model", torch.bfloat16, shapes_only=True)
    names = read_names(described)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in described.named_parameters():
        module = name.rpartition(".")[0]
        if spec := names.specs.get(module):
            for projection in spec.projections:
                experts = names.experts_on_disk(module, projection)
                shapes |= {f"{expert}.weight": spec.shape(projection) for expert in experts}
        else:
            shapes[f"{names.on_disk(module)}.weight"] = tuple(parameter.shape)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        header, end = {}, 0
        for name, shape in tensors.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / "model" / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_random_adapter(folder / "model", folder / "adapter")


def write_random_adapter(model: Path, folder: Path) -> None:
    """An adapter of all experts and the attention."""
    described = build_meta_model(model, torch.bfloat16, shapes_only=True)
    names = read_names(described)
    torch.manual_seed(1)
    wanted: dict[str, tuple[int, int]] = {}
    for module, spec in names.specs.items():
        for projection in spec.projections:
            wanted |= dict.fromkeys(names.experts_on_disk(module, projection), spec.shape(projection))
    for name, linear in described.named_modules():
        if ".self_attn." in name and hasattr(linear, "out_features"):
            wanted[name] = linear.out_features, linear.in_features
    tensors = []
    for name, (outputs, inputs) in wanted.items():
        for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = 0.02 * torch.randn(shape)
            tensors.append(Outgoing(f"{PREFIX}{name}.lora_{factor}.weight", values.dtype, shape, values.clone))
    layout = StockLayout(RANK, target_modules=["w1", "w2", "w3", "q_proj", "k_proj", "v_proj", "o_proj"])
    write_adapter(
        folder, sorted(tensors, key=lambda each: each.name), stock_config(Origin(str(model), None, {}), layout)
    )


def source_in(folder: Path) -> ExportSource:
    """What is exported, of the checkpoint and the adapter in a folder."""
    values = {"model": str(folder / "model"), "data": {"train": "rows.jsonl"}, "output_dir": str(folder)}
    context = RunContext(
        parse_config(values), RunRecord.start(folder), torch.device("cpu"), Bars(Console(file=io.StringIO()))
    )
    return read_source(context, folder / "adapter", ModelSource(folder / "model"))


def _in_own_process(folder: Path, name: str) -> dict[str, float]:
    command = [sys.executable, sys.argv[0], "export_merge", "--folder", str(folder), "--only", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def _measure_full(folder: Path) -> dict[str, float]:
    imports = _peak()
    source = source_in(folder)
    additions = find_additions(source)
    for addition in additions.values():
        for part in range(addition.num_parts):
            addition.part(part)
    merge_shard(folder / "model" / "model-0.safetensors", folder / "merged.safetensors", additions, lambda _: None)
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    found = {"adapter_bytes": size, "peak_rss_bytes": _peak(), "imports_rss_bytes": imports}
    print(json.dumps(found))
    return found


def _measure(folder: Path, name: str) -> dict[str, float]:
    if name == "full":
        return _measure_full(folder)
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    source = source_in(folder) if name == "merge" else None
    os.sync()
    started = time.monotonic()
    if source:
        Merged().write(source, out, lambda *_: None)
    else:
        for shard in sorted((folder / "model").glob("*.safetensors")):
            shutil.copyfile(shard, out / shard.name)
            with (out / shard.name).open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.monotonic() - started
    found = {"seconds": seconds, "peak_rss_bytes": _peak()}
    print(json.dumps(found))
    return found


def _require_merged(folder: Path) -> None:
    """Compare a few tensors with base + scale * B @ A."""
    source, merged = source_in(folder), open_checkpoint(folder / "merge").tensors
    names = [name for name in source.by_name if ".experts.3.w" in name or ".q_proj" in name]
    for name in names:
        a, b, scale = source.by_name[name]
        expected = (source.index.tensors[f"{name}.weight"].read().float() + scale * (b @ a)).bfloat16()
        found = merged[f"{name}.weight"].read()
        if not torch.allclose(expected.float(), found.float(), rtol=2**-7, atol=1e-6):
            raise report.CorrectnessError(f"{name}: merged otherwise than base and adapter")
