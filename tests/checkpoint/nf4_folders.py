"""What tests of NF4 folders share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertune.checkpoint.formats.nf4_folder import write_manifest
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.model_folder import FOLDER_MARK
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.writer import HashedFile
from expertune.storage import hash_file
from tests.tiny_models import changed, frozen_bytes


def quantized(source: Path, out: Path, **settings: Any) -> Path:
    """The folder at `out`, written from `source`."""
    quantize(str(source), out, **settings)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included; of the manifest what does not depend on where the source lies."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "expertune.json" in files:
        manifest = json.loads(files["expertune.json"])
        manifest["source"] = {"shards": manifest["source"]["shards"]}
        del manifest["sha256"]
        files["expertune.json"] = json.dumps(manifest).encode()
    return files


def seal(folder: Path, **sections: Any) -> None:
    """Write the manifest again for the files as they are, with other sections where given, as `quantize` would."""
    manifest = json.loads((folder / FOLDER_MARK).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if (folder / name).is_file():
            found = hash_file(folder / name)
            manifest["files"][name] = {"sha256": found.sha256, "bytes": found.nbytes}
    write_manifest(folder, manifest | sections)


def weights(folder: Path) -> dict[str, bytes]:
    """Its safetensors files."""
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


def assert_same_bytes(one: LoadedModel, other: LoadedModel) -> None:
    assert changed(frozen_bytes(one.model), frozen_bytes(other.model)) == []


class Killed(BaseException):
    """Stands for a signal that no code answers."""


def stop_after(count: int, error: BaseException) -> Callable[..., None]:
    """What writes bytes, until so many writes have been made."""
    write, calls = HashedFile.write, 0

    def write_some(file: HashedFile, view: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            file.file.write(view[: len(view) // 2])
            raise error
        write(file, view)

    return write_some


def interrupt(source: Path, out: Path) -> None:
    """Begin an NF4 folder, and leave it with its first layer finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(source), out)
    assert sorted(weights(out)) == ["layer-00000.safetensors"]
