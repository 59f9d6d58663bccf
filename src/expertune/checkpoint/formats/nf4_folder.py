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
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.model_folder import FOLDER_MARK, PROGRESS_MARK, require_finished
from expertune.checkpoint.reader import INDEX_NAME, CheckpointIndex, TensorEntry, open_checkpoint
from expertune.checkpoint.writer import PADDING
from expertune.errors import CheckpointError
from expertune.kernels.nf4 import Nf4Bytes, Scheme
from expertune.storage import write_json

FORMAT_VERSION = 1
METHOD = "expertune"
GUIDE = "README.md"
REST = "rest.safetensors"

ABSMAX, CALIBRATED = "absmax", "calibrated"
FITS = (ABSMAX, "mse", CALIBRATED)
"""Ways to choose scales: where a folder does not say, by the largest magnitude; by the error; and by a calibration."""

STACKS = ("gate_up", "down")
BUFFERS = Nf4Bytes._fields

STATE_SUFFIX = ".weight.quant_state.bitsandbytes__nf4"
_DIGEST = "sha256"
_SECTIONS = ("source", "quantization", "files")
_KEYS = {"format_version", "dtype", "left_out", _DIGEST, *_SECTIONS}

_AGAIN = "copy the folder again, or quantize the model again"
_ANEW = "delete this folder, and quantize the model again"


@dataclass(frozen=True)
class Nf4Folder:
    """A finished NF4 folder, by its manifest and its headers; no weight has been read.

    Attributes:
        folder: where it lies.
        manifest: content of `expertune.json`.
        index: a TensorEntry for each tensor by live name, in file order.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    index: CheckpointIndex = field(repr=False)

    @property
    def double_quantization(self) -> bool:
        """Whether scales are held in 8 bits."""
        return bool(self.manifest["quantization"]["double_quantization"])

    @property
    def scheme(self) -> Scheme:
        """What the experts' codes stand for; linears are NF4 in either case."""
        return self.manifest["quantization"].get("scheme", "nf4")

    @property
    def fit(self) -> str:
        """How the scales were chosen: a value of `quantization.fit`."""
        return str(self.manifest["quantization"].get("fit", ABSMAX))

    @property
    def calibration(self) -> str | None:
        """sha256 of the mean squares that the scales were chosen by; None where they were not, or it does not say."""
        digest = self.manifest["quantization"].get("calibration_sha256")
        return digest if isinstance(digest, str) else None

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
    require_finished(folder)
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
    for key, default, known in (("scheme", "nf4", get_args(Scheme)), ("fit", ABSMAX, FITS)):
        value = manifest["quantization"].get(key, default)
        if value not in known:
            raise CheckpointError(
                f"{path}: quantization.{key} is {value!r}, which is none of {', '.join(known)}; {_AGAIN}"
            )
    unknown = sorted(manifest.keys() - _KEYS)
    files = manifest["files"].items()
    bad = next((name for name, record in files if Path(name).name != name or not is_file_record(record)), None)
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


def is_file_record(record: Any) -> bool:
    """Whether this is what a manifest or a note has of a file: its sha256 and its size in bytes."""
    if not isinstance(record, dict):
        return False
    digest, nbytes = record.get("sha256"), record.get("bytes")
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None and type(nbytes) is int


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What an interrupted quantization has noted, with `files`, `plan` and `shards` mappings; None where there is none.

    Raises:
        CheckpointError: the note is damaged.
    """
    path = folder / PROGRESS_MARK
    if not path.is_file():
        return None
    note = _read_json(path, ("files", "plan", "shards"), _ANEW)
    if _DIGEST not in note:
        raise CheckpointError(f"{path}: of an earlier version of Expertune, which this one does not continue; {_ANEW}")
    if note.pop(_DIGEST) != _digest_of(note):
        raise damaged_progress(folder, "its content is not what was written")
    return note


def write_progress(folder: Path, note: Mapping[str, Any]) -> None:
    """Write the note with a sha256 of its own content."""
    write_json(folder / PROGRESS_MARK, {**note, _DIGEST: _digest_of(note)})


def damaged_progress(folder: Path, problem: str) -> CheckpointError:
    """What is raised of a note that says what no quantization has noted."""
    return CheckpointError(f"{folder / PROGRESS_MARK}: damaged: {problem}; {_ANEW}")


def _read_json(path: Path, sections: Iterable[str], fix: str = _AGAIN) -> dict[str, Any]:
    if not path.is_file():
        problem = f"no {path.name} here; is it an NF4 folder?" if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{path.parent}: {problem}")
    values = read_mapping(path, fix=fix)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this Expertune reads {FORMAT_VERSION}; quantize the model again, or "
            "use the version that wrote it"
        )
    missing = [section for section in sections if not isinstance(values.get(section), dict)]
    if missing:
        raise CheckpointError(f"{path}: damaged: {missing[0]} is missing; {fix}")
    return values


def _require_size(path: Path, nbytes: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing; {_AGAIN}")
    if path.stat().st_size != nbytes:
        raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes, {nbytes} were written; {_AGAIN}")
