"""What a plan has read once, kept in the user's cache folder under the hash of all that decides it.

Reading a model's shapes takes torch and transformers' models, and reading examples takes a tokenizer: most of a plan's
time, for a few numbers that are the same as the last time. A kept file is used only if the hash of its content is the
one that stands in it, and only while the files that it was read by are what they were; any other is made anew, and so
is everything where a library is no release.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from expertune.kernels.cache import path_of, remember
from expertune.storage import hash_file

T = TypeVar("T")

# The library whose files people edit in place, to try a change of a model.
_OF_MODELS = "transformers"

# A safetensors file begins with the length of its header, and no header is larger.
_LENGTH_BYTES, _MOST_HEADER_BYTES = 8, 100 * 2**20


def kept(
    kind: str,
    decides: Callable[[], Mapping[str, Any] | None],
    read: Callable[[], T],
    form: Any,
    is_final: Callable[[T], bool] = lambda _: True,
) -> T:
    """What `read` returns, or what an earlier process kept of it.

    Args:
        kind: what it is, as the name of its file begins.
        decides: looks at all that decides it, as plain values; None where that is not known, and nothing is kept then.
        read: reads it anew.
        form: a `pydantic.TypeAdapter` of its type.
        is_final: whether it may be kept; not where a connection was missing.
    """
    decided_by = decides()
    if decided_by is None:
        return read()

    def may_keep(made: T) -> bool:
        return is_final(made) and decides() == decided_by  # a file may have been written to meanwhile

    def dump(made: T) -> str:
        imported = _imported()
        return f"{json.dumps([imported, _state(imported)])}\n{form.dump_json(made, warnings=False).decode()}"

    def load(text: str) -> T:
        read_by, _, content = text.partition("\n")
        imported, state = json.loads(read_by)
        if state != _state(imported):
            raise ValueError("a file of the library has been edited")
        found: T = form.validate_json(content)
        return found

    return remember(path_of(kind, decided_by, "plans"), read, dump, load, may_keep)


def _imported() -> list[str]:
    """Files of the library of models that this process has imported, those of a model's code among them."""
    prefix = f"{_OF_MODELS}."
    of_it = (module for name, module in sys.modules.items() if f"{name}.".startswith(prefix))
    imported = (getattr(module, "__file__", None) for module in of_it)
    return sorted({os.path.relpath(file, _root()) for file in imported if file})


def _state(imported: list[str]) -> str:
    """Sizes and times of these files: of one that was edited in place pip's RECORD says nothing."""
    states = ((_root() / name).stat() for name in imported)
    return hashlib.sha256(repr([(each.st_size, each.st_mtime_ns) for each in states]).encode()).hexdigest()


@cache
def _root() -> Path:
    spec = find_spec(_OF_MODELS)
    if spec is None or spec.origin is None:
        raise OSError(f"{_OF_MODELS} is nowhere")
    return Path(spec.origin).parent


def libraries(*names: str) -> list[list[str]] | None:
    """Releases of libraries by the hashes of all their files; None where one is no release that pip has installed.

    What an editable install or another folder on Python's path gives may change with the version staying as it is. This
    package itself counts by its code.
    """
    found = [_release(name) for name in names]
    known = [each for each in found if each is not None]
    return [[sys.version], [_own_code()], *known] if len(known) == len(names) else None


def _release(name: str) -> list[str] | None:
    try:
        installed, spec = distribution(name), find_spec(name)
    except (PackageNotFoundError, ValueError):
        return None
    record = installed.read_text("RECORD")
    if record is None or spec is None or spec.origin is None:
        return None
    with suppress(ValueError, AttributeError):
        if json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
            return None
    if Path(str(installed.locate_file(f"{name}/__init__.py"))).resolve() != Path(spec.origin).resolve():
        return None
    return [name, installed.version, hashlib.sha256(record.encode()).hexdigest()]


@cache
def _own_code() -> str:
    """Hash of this package's code and templates."""
    root = Path(str(files("expertune")))
    code = sorted(path for suffix in ("py", "jinja") for path in root.rglob(f"*.{suffix}"))
    hashed = hashlib.sha256()
    for path in code:
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()


def of_folder(folder: Path, suffixes: Iterable[str]) -> list[list[Any]]:
    """What a folder says of a model without its weights: hashes of its files, and of the headers of its shards.

    Args:
        folder: of the model, or its snapshot of a hub repository.
        suffixes: which files count whole.

    Raises:
        OSError: one cannot be read.
    """
    found: list[list[Any]] = []
    shards, wanted = ".safetensors", tuple(suffixes)
    for path in sorted(each for each in folder.iterdir() if each.suffix in (shards, *wanted)):
        if not path.is_file():  # a pipe would never end
            found.append([path.name, None])
        elif path.suffix == shards:
            found.append([path.name, path.stat().st_size, _header(path)])
        else:
            found.append([path.name, hash_file(path).sha256])
    return found


def _header(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        return hashlib.sha256(file.read(min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES))).hexdigest()
