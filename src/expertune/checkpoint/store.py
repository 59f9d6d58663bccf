"""The NF4 folder: a quantized model on disk. This file knows the format; `docs/reference/nf4-folder.md` is its text.

    config.json, generation config, tokenizer    as in the source; config.json says `quant_method: "expertune"`
    layer-00000.safetensors ...                  one for each decoder layer
    rest.safetensors                             embeddings, last norm, output head
    model.safetensors.index.json                 which tensor lies in which file
    expertune.json                               source, settings, and sha256 of every other file; written last
    README.md                                    for people: how to load the folder, and where adapters go

Tensors carry the live model's names. The buffers of an experts module lie side by side at the start of their layer's
file, each at a multiple of 64 bytes, so that they can be mapped, or read at once.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.reader import INDEX_NAME, CheckpointIndex, TensorEntry, dtype_name, open_checkpoint
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError
from expertune.kernels.nf4 import Scheme
from expertune.storage import write_json

FOLDER_MARK = "expertune.json"
PROGRESS_MARK = "expertune.partial.json"
FORMAT_VERSION = 1
METHOD = "expertune"
GUIDE = "README.md"
REST = "rest.safetensors"
ALIGNMENT = 64

STACKS = ("gate_up", "down")
BUFFERS = ("packed", "absmax", "nested_absmax", "offset")

PADDING = "padding."
STATE_SUFFIX = ".weight.quant_state.bitsandbytes__nf4"
_CHUNK = 2**22
_DIGEST = "sha256"
_SECTIONS = ("source", "quantization", "files")
_KEYS = {"format_version", "dtype", "left_out", _DIGEST, *_SECTIONS}

_AGAIN = "copy the folder again, or quantize the model again"


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file that was written.

    Attributes:
        sha256: of its content, as hexadecimal digits.
        nbytes: its size.
    """

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Outgoing:
    """A tensor that is about to be written.

    Attributes:
        name: live name.
        dtype: torch dtype.
        shape: sizes.
        read: gives the tensor when its turn comes.
        aligned: begin at a multiple of `ALIGNMENT` bytes, before all tensors that need not.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    aligned: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Nf4Folder:
    """A finished NF4 folder, by its manifest and its headers; no weight has been read.

    Attributes:
        folder: where it lies.
        manifest: content of `expertune.json`.
        index: a TensorEntry for each tensor by live name, in file order.
    """

    folder: Path
    manifest: dict[str, Any]
    index: CheckpointIndex

    @property
    def settings(self) -> QuantizationConfig:
        """How the weights were quantized."""
        return QuantizationConfig(double_quantization=self.manifest["quantization"]["double_quantization"])

    @property
    def scheme(self) -> Scheme:
        """What the experts' codes stand for; linears are NF4 in either case."""
        return self.manifest["quantization"].get("scheme", "nf4")

    @property
    def source(self) -> tuple[str, str | None] | None:
        """Path or hub id, and commit, of the checkpoint that it was made of; None where the manifest does not say."""
        model, revision = self.manifest["source"].get("model"), self.manifest["source"].get("revision")
        return (model, revision if isinstance(revision, str) else None) if isinstance(model, str) else None

    @property
    def experts(self) -> list[str]:
        """Live names of the experts modules, in file order."""
        suffix = f".{STACKS[0]}.{BUFFERS[0]}"
        return [key.removesuffix(suffix) for key in self.index.tensors if key.endswith(suffix)]

    @property
    def linears(self) -> list[str]:
        """Live names of the 4-bit linears, in file order."""
        return [key.removesuffix(STATE_SUFFIX) for key in self.index.tensors if key.endswith(STATE_SUFFIX)]

    def experts_entries(self, module: str) -> tuple[Path, dict[str, TensorEntry]]:
        """The file of one experts module and its eight buffers by name below the module, e.g. `gate_up.packed`.

        Raises:
            CheckpointError: a buffer is missing, or they are spread over files.
        """
        names = [f"{stack}.{buffer}" for stack in STACKS for buffer in BUFFERS]
        missing = [name for name in names if f"{module}.{name}" not in self.index.tensors]
        if missing:
            raise CheckpointError(f"{self.folder}: missing tensors: {module}.{missing[0]}; quantize the model again")
        entries = {name: self.index.tensors[f"{module}.{name}"] for name in names}
        files = {entry.shard for entry in entries.values()}
        if len(files) > 1:
            raise CheckpointError(f"{self.folder}: {module} lies in {len(files)} files; quantize the model again")
        return files.pop(), entries

    def linear_entries(self, linear: str) -> dict[str, TensorEntry]:
        """A 4-bit linear's tensors: `weight`, and bitsandbytes' state under `absmax`, `quant_map` and so on."""
        prefix = f"{linear}.weight"
        return {
            key.removeprefix(prefix).removeprefix(".") or "weight": entry
            for key, entry in self.index.tensors.items()
            if key == prefix or key.startswith(prefix + ".")
        }


def is_nf4_folder(folder: str | Path) -> bool:
    """Whether a folder is an NF4 folder, finished or not."""
    return any((Path(folder) / mark).is_file() for mark in (FOLDER_MARK, PROGRESS_MARK))


def read_nf4_folder(folder: str | Path) -> Nf4Folder:
    """Manifest and headers of an NF4 folder.

    Raises:
        CheckpointError: the folder is unfinished, of another format version or scheme, or a file of it is missing,
            damaged or of another size than was written; names the file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, record in manifest["files"].items():
        if name.endswith(".safetensors"):
            _require_size(folder / name, record["bytes"])
    index = open_checkpoint(folder)
    stray = sorted({entry.shard.name for entry in index.tensors.values()} - manifest["files"].keys())
    if stray:
        raise CheckpointError(f"{folder}: {FOLDER_MARK} knows nothing of {stray[0]}; {_AGAIN}")
    tensors = {key: entry for key, entry in index.tensors.items() if not key.startswith(PADDING)}
    return Nf4Folder(folder, manifest, CheckpointIndex(folder, tensors))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Content of `expertune.json`.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format version or scheme.
    """
    path = folder / FOLDER_MARK
    if not path.is_file() and (folder / PROGRESS_MARK).is_file():
        raise CheckpointError(
            f"{folder}: this NF4 folder is unfinished; the `expertune quantize` command that began it goes on with it"
        )
    manifest = _read_json(path, _SECTIONS)
    _require_sound(path, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `expertune.json` with a sha256 of its own content, so that damage to it is noticed as well."""
    write_json(folder / FOLDER_MARK, {**manifest, _DIGEST: _digest_of(manifest)})


def _digest_of(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_sound(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose content is not what was written; one without a digest of its own is from before."""
    scheme, known = manifest["quantization"].get("scheme", "nf4"), get_args(Scheme)
    if scheme not in known:
        raise CheckpointError(
            f"{path}: quantization.scheme is {scheme!r}, which is none of {', '.join(known)}; {_AGAIN}"
        )
    unknown = sorted(manifest.keys() - _KEYS)
    bad = next((name for name, record in manifest["files"].items() if not _is_file_record(name, record)), None)
    if unknown:
        problem = f"{unknown[0]!r} is no entry of it"
    elif type(manifest["quantization"].get("double_quantization")) is not bool:
        problem = "quantization.double_quantization is neither true nor false"
    elif bad is not None:
        problem = f"what it says of the file {bad!r} is no sha256 and size"
    elif missing := {INDEX_NAME, "config.json"} - manifest["files"].keys():
        problem = f"it says nothing of {sorted(missing)[0]}"
    elif manifest.get(_DIGEST, _digest_of(manifest)) != _digest_of(manifest):
        problem = "its content is not what was written"
    else:
        return
    raise CheckpointError(f"{path}: damaged: {problem}; {_AGAIN}")


def _is_file_record(name: str, record: Any) -> bool:
    if Path(name).name != name or not isinstance(record, dict):
        return False
    digest, nbytes = record.get("sha256"), record.get("bytes")
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None and type(nbytes) is int


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What an interrupted quantization has noted; None where there is none.

    Raises:
        CheckpointError: the note is damaged.
    """
    path = folder / PROGRESS_MARK
    return _read_json(path, ("files", "plan", "shards")) if path.is_file() else None


def _read_json(path: Path, sections: Iterable[str]) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name} here; is it an NF4 folder?")
    values = read_mapping(path, fix=_AGAIN)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this Expertune reads {FORMAT_VERSION}; quantize the model again, or "
            "use the version that wrote it"
        )
    missing = [section for section in sections if not isinstance(values.get(section), dict)]
    if missing:
        raise CheckpointError(f"{path}: damaged: {missing[0]} is missing; {_AGAIN}")
    return values


def _require_size(path: Path, nbytes: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing; {_AGAIN}")
    if path.stat().st_size != nbytes:
        raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes, {nbytes} were written; {_AGAIN}")


def hash_file(path: Path) -> FileRecord:
    """sha256 and size of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(digest.hexdigest(), size)


def write_tensors(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write a safetensors file beside `path`, then rename it; one tensor is asked for at a time.

    The bytes depend on names, shapes, values and `metadata` only: safetensors' own writer puts the entries of the
    metadata into an order that differs from one process to the next. Aligned tensors come first, in the order given,
    with tensors named `padding.*` after them where their sizes leave a gap: the format allows no holes.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
        ValueError: a tensor that was handed over is not the one that was announced.
    """
    ordered = _in_file_order(list(tensors), path.stem)
    header = _header(ordered, metadata or {})
    digest, size = hashlib.sha256(header), len(header)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb", buffering=0) as file:
            _write_all(file, memoryview(header))
            for outgoing in ordered:
                tensor = outgoing.read()
                if tuple(tensor.shape) != outgoing.shape or tensor.dtype != outgoing.dtype:
                    raise ValueError(f"{outgoing.name}: {tuple(tensor.shape)} of {tensor.dtype} is not as announced")
                if tensor.numel():
                    view = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                    _write_all(file, view)
                    digest.update(view)
                    size += len(view)
                    del view  # or this tensor would stay while the next is read
                del tensor
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return FileRecord(digest.hexdigest(), size)


def _write_all(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done : done + _CHUNK])


def _in_file_order(tensors: list[Outgoing], file: str) -> list[Outgoing]:
    ordered: list[Outgoing] = []
    position = num_paddings = 0
    for outgoing in (tensor for tensor in tensors if tensor.aligned):
        ordered.append(outgoing)
        position += outgoing.nbytes
        gap = -position % ALIGNMENT
        if gap:
            ordered.append(_padding(f"{PADDING}{file}.{num_paddings}", gap))
            position, num_paddings = position + gap, num_paddings + 1
    # Wide dtypes first: each tensor then begins at a multiple of its item's size.
    rest = sorted((t for t in tensors if not t.aligned), key=lambda t: (-t.dtype.itemsize, t.name))
    return ordered + rest


def _padding(name: str, nbytes: int) -> Outgoing:
    return Outgoing(name, torch.uint8, (nbytes,), lambda: torch.zeros(nbytes, dtype=torch.uint8))


def _header(ordered: list[Outgoing], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header, filled up with blanks so that the data begins at a multiple of `ALIGNMENT`."""
    position = 0
    values: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for outgoing in ordered:
        end = position + outgoing.nbytes
        values[outgoing.name] = {
            "dtype": dtype_name(outgoing.dtype),
            "shape": list(outgoing.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(values, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
