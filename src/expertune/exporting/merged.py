"""Base and adapter as one 16-bit model: the source's shards with the adapter added, or the 4-bit values with it."""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from expertune.checkpoint.json_file import read_config, read_mapping
from expertune.checkpoint.model_folder import FOLDER_MARK
from expertune.checkpoint.quantize import config_dtype
from expertune.checkpoint.reader import INDEX_NAME
from expertune.checkpoint.writer import write_tensors
from expertune.errors import ExportError, option
from expertune.exporting.additions import find_additions, live_names
from expertune.exporting.dequantized import DequantizedModel, as_config
from expertune.exporting.formats import Engine, Format, Options, Progress
from expertune.exporting.merging import merge_shard
from expertune.exporting.place import MARK
from expertune.exporting.source import ExportSource
from expertune.storage import BESIDE, hash_file, write_json

MANIFEST = "expertune-merge.json"
"""What was merged, and which files are finished."""

# What transformers and libraries of tokenizers read beside weights. A folder may hold more, such as a training's state,
# and a merged model is made to be given to others.
_BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)

FLOOR = 1e-3
"""Of a merged model, in nats: sums in another order round a weight to its neighbor now and then."""


class Merged(Format):
    """`merged`: into the source's shards, with names and metadata as there."""

    name = "merged"
    resumes = True
    takes_dora = True

    def require(self, source: ExportSource) -> None:
        """Refuse a base without 16-bit weights, and what cannot be merged."""
        if source.is_packed:
            raise ExportError(
                f"--to merged: {source.base.folder} holds 4-bit weights, and no 16-bit ones to merge into; give the "
                f"checkpoint that it was made of with {option('model', 'MODEL')}, or merge into the 4-bit values with "
                f"{option('base', 'dequantized')}"
            )
        find_additions(source)

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of the source's shards."""
        return sum(shard.stat().st_size for shard in _shards(source))

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the shards that are not finished yet, and the files beside them."""
        manifest = _resumed(folder, _identity(source, "source"))
        additions, total, before = find_additions(source), self.nbytes(source), 0
        for shard in _shards(source):
            size, started = shard.stat().st_size, before
            if shard.name not in manifest["files"]:
                merge_shard(
                    shard,
                    folder / shard.name,
                    additions,
                    lambda done, name=shard.name, first=started: progress(name, first + done, total),  # type: ignore[misc]
                )
                _note_finished(folder, manifest, shard.name)
            before += size
        for name in small_files(source):
            shutil.copyfile(source.base.folder / name, folder / name)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """Stock transformers."""
        return [_engine({"model": str(base)}, folder, dtypes_on_disk(source), "source")]


class MergedIntoDequantized(Format):
    """`merged --base dequantized`: into the values that the adapter was trained beside, a file for each layer."""

    name = "merged"
    resumes = True
    takes_dora = True

    def require(self, source: ExportSource) -> None:
        """Refuse an adapter of an output head that is the embedding too."""
        source.model.tie_weights()
        own = {name for name, _ in source.model.named_parameters()}
        missing = [name for name in source.changed if name not in own]
        if missing:
            raise ExportError(
                f"--to merged: {missing[0]} is the embedding too, so that nothing can be merged into it alone; export "
                "the adapter by itself, e.g. with --to peft"
            )

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of all weights in the dtype of the output."""
        size = config_dtype(read_config(source.base.folder)).itemsize
        return source.num_weights * size

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the files that are not finished yet."""
        write_dequantized(source, folder, progress)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """Stock transformers."""
        packed, tensors = config_dtype(read_config(source.base.folder)), source.index.tensors
        rounded: dict[str, str] = {}
        for name in source.factors.linears:  # of those that are not in 4 bits, the dtype is kept
            held = tensors.get(f"{source.names.on_disk(name)}.weight") or tensors.get(f"{name}.weight")
            rounded[f"{name}.weight"] = _name(held.dtype if held and held.dtype.is_floating_point else packed)
        return [_engine(None, folder, rounded | {"*": _name(packed)}, "dequantized")]


def _engine(
    base: dict[str, Any] | None, folder: Path, rounded: dict[str, str], reference: Literal["source", "dequantized"]
) -> Engine:
    exported = {"model": str(folder)}
    return Engine("transformers", "stock.py", base, exported, rounded, reference, has_trained=True, floor=FLOOR)


def dtypes_on_disk(source: ExportSource) -> dict[str, str]:
    """By live name, the dtype that each parameter which the adapter changes has in the checkpoint."""
    found: dict[str, str] = {}
    for key in find_additions(source):
        names = live_names(source, source.names.locate(key))
        found |= dict.fromkeys(names, _name(source.index.tensors[key].dtype))
    return found


def write_dequantized(
    source: ExportSource,
    folder: Path,
    progress: Progress,
    is_adapted: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's 4-bit values as a 16-bit folder that stock transformers reads, or go on with one.

    Args:
        source: the run, with its adapter.
        folder: where to; it exists.
        progress: called after each file.
        is_adapted: whether the adapter is added.
        dtype: of the values; None means the base's own.
    """
    manifest = _resumed(folder, _identity(source, "dequantized" if is_adapted else "dequantized, without the adapter"))
    model, expected = DequantizedModel(source, is_adapted, dtype), MergedIntoDequantized().nbytes(source)
    count, weight_map, total = len(model.parts), manifest.setdefault("tensors", {}), 0
    for number, part in enumerate(model.parts, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        if file not in manifest["files"]:
            tensors = list(model.tensors(part))
            write_tensors(folder / file, tensors)
            weight_map |= {tensor.name: file for tensor in tensors}
            del tensors
            _note_finished(folder, manifest, file)
        model.drop(part)
        total += manifest["files"][file][0]
        progress(file, total, max(total, expected))
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name in small_files(source):
        if name != "config.json" and not name.endswith(".index.json") and name != FOLDER_MARK:
            shutil.copyfile(source.base.folder / name, folder / name)
    write_json(folder / "config.json", as_config(source, model.dtype))


def make(name: str, options: Options) -> Merged | MergedIntoDequantized:
    """The format of this name."""
    return MergedIntoDequantized() if options.base == "dequantized" else Merged()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shards(source: ExportSource) -> list[Path]:
    return sorted({entry.shard for entry in source.index.tensors.values()})


def small_files(source: ExportSource) -> list[str]:
    """Config, tokenizer, index and the like; with code of the model's own where that is trusted."""
    patterns = [*_BESIDE_WEIGHTS, *(["*.py"] if source.base.trust_remote_code else [])]
    return sorted({path.name for each in patterns for path in source.base.folder.glob(each) if path.is_file()})


def _identity(source: ExportSource, base: str) -> dict[str, Any]:
    """What a merge is made of."""
    adapter = Path(source.adapter.where)
    shards = {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in _shards(source)}
    files = "adapter_config.json", "adapter_model.safetensors"
    return {
        "versions": {name: version(name) for name in ("expertune", "transformers")},
        "base": base,
        "adapter": {name: hash_file(adapter / name).sha256 for name in files},
        "shards": shards,
    }


def _note_finished(folder: Path, manifest: dict[str, Any], file: str) -> None:
    manifest["files"][file] = _state(folder / file)
    write_json(folder / MANIFEST, manifest)


def _state(file: Path) -> list[int]:
    """What changes when somebody writes to a file."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _resumed(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder that was started, without files that are not as they were finished.

    Raises:
        ExportError: it holds another merge.
    """
    path = folder / MANIFEST
    for beside in folder.glob(f".*{BESIDE}"):
        beside.unlink()  # of a process that was killed
    if not path.is_file():
        if any(each.name != MARK for each in folder.iterdir()):
            raise ExportError(f"{folder}: holds something else; delete it, or choose another {option('out', 'DIR')}")
        return {"merged": identity, "files": {}}
    manifest = read_mapping(path, fix="delete the folder")
    if manifest.get("merged") != identity:
        raise ExportError(
            f"{folder}: was started with another adapter, other weights of the base, or another version of Expertune "
            f"or transformers; delete it, or choose another {option('out', 'DIR')}"
        )
    states = {each.name: _state(each) for each in folder.iterdir() if each.is_file()}
    manifest["files"] = {name: state for name, state in manifest["files"].items() if states.get(name) == state}
    return manifest
