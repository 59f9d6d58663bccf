"""The files of an NF4 folder are checked against their sha256: once on a machine, and again after a change.

A damaged byte of a weight raises nothing: the model answers, a little or a lot worse. So a folder is read once before
it is used, at the speed of the disk, and what was found to be whole is remembered in the user's cache, by size and
times of each file. Damage to the manifest itself is noticed by the digest that it holds of its own content.

Of several processes each reads a part of the files, so that they are read once on each machine.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from expertune.checkpoint.formats.nf4_folder import read_manifest
from expertune.checkpoint.model_folder import FOLDER_MARK
from expertune.distributed.mesh import Ranks
from expertune.errors import CheckpointError
from expertune.kernels.cache import cache_folder, read_kept
from expertune.storage import hash_file, write_json

_MEMORY = "verified-folders.json"

# Times of files advance in steps: a file that was written less than this ago could change again without a trace.
_STEP_NS = 50_000_000

# Reads at once; more do not make a disk faster.
_READERS = 4

# Below this nobody waits long enough to be worth a line.
_WORTH_A_LINE = 2**30


# What this process knows from others to be whole; only one of them keeps it.
_whole: dict[str, dict[str, list[int]]] = {}


def require_verified(
    folder: str | Path, notify: Callable[[str], None] | None = None, ranks: Ranks | None = None
) -> None:
    """Refuse an NF4 folder whose files are not what was written.

    What has been verified on this machine, and has the same size and times since, is not read again.

    Args:
        folder: a finished NF4 folder.
        notify: called with one line before a large folder is read.
        ranks: the processes that all call this.

    Raises:
        CheckpointError: files are missing or have changed; names them.
    """
    folder, ranks = Path(folder).resolve(), ranks or Ranks()
    files = read_manifest(folder)["files"]
    states, key = _states(folder, files), str(folder)
    known = states is not None and states in (_whole.get(key), _remembered().get(key))
    if not ranks.any(not known):
        return
    nbytes = sum(record["bytes"] for record in files.values())
    if notify and nbytes >= _WORTH_A_LINE:
        notify(f"{folder}: verifying {nbytes / 1e9:.1f} GB against its manifest, once on this machine")
    verify(folder, ranks)


def verify(folder: str | Path, ranks: Ranks | None = None) -> int:
    """Hash every file of an NF4 folder, whatever is remembered of it; returns their number.

    Args:
        folder: a finished NF4 folder.
        ranks: the processes that all call this.

    Raises:
        CheckpointError: files are missing or have changed; names them.
    """
    folder, ranks = Path(folder).resolve(), ranks or Ranks()
    files = read_manifest(folder)["files"]
    before = _states(folder, files)
    _require_same(folder, files, ranks)
    if ranks.several and before:
        _whole[str(folder)] = before
    if ranks.rank == ranks.local[0]:
        _remember(folder, before)
    return len(files)


def _require_same(folder: Path, files: dict[str, Any], ranks: Ranks) -> None:
    largest_first = sorted(files, key=lambda name: -files[name]["bytes"])
    own = largest_first[ranks.local.index(ranks.rank) :: len(ranks.local)]

    def change(name: str) -> str | None:
        path, record = folder / name, files[name]
        try:
            if path.stat().st_size != record["bytes"] or hash_file(path).sha256 != record["sha256"]:
                return name
        except FileNotFoundError:
            return f"{name} (missing)"
        except OSError as error:
            return f"{name} (cannot be read: {error.strerror})"
        return None

    with ThreadPoolExecutor(min(_READERS, torch.get_num_threads())) as pool:
        found = [problem for problem in pool.map(change, own) if problem]
    if changed := sorted({problem for of_rank in ranks.gather(found) for problem in of_rank}):
        raise CheckpointError(
            f"{folder}: changed since it was written: {', '.join(changed)}; copy the folder again, or quantize the "
            "model again"
        )


def _states(folder: Path, files: Iterable[str]) -> dict[str, list[int]] | None:
    """Size and times of the manifest and of each file; None where one is missing."""
    try:
        status = {name: (folder / name).stat() for name in (FOLDER_MARK, *files)}
    except OSError:
        return None
    return {name: [each.st_size, each.st_mtime_ns, each.st_ctime_ns] for name, each in status.items()}


def _remembered() -> dict[str, Any]:
    try:
        known = read_kept(cache_folder() / _MEMORY)
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(folder: Path, states: dict[str, list[int]] | None) -> None:
    """Keep that a folder was whole when its files had these states; folders that are gone are forgotten."""
    newest = max((max(times) for _, *times in (states or {}).values()), default=0)
    if states is None or time.time_ns() - newest < _STEP_NS:
        return
    known = {path: kept for path, kept in _remembered().items() if Path(path).is_dir()}
    try:
        write_json(cache_folder() / _MEMORY, known | {str(folder): states})
    except OSError:
        return  # no cache: the folder is read again next time
