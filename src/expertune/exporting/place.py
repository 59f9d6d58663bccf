"""Where an export goes: `FOLDER.partial` while it is written, by one process and with a mark that says whose it is."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertune.errors import ExportError, option
from expertune.run.lock import lock_file, make_folder, unlock
from expertune.storage import SCRATCH

MARK = ".export.json"
"""In a folder that an export has made: who writes it. What has none is nobody's to delete."""

_OTHER = option("out", "DIR")


def require_free(folder: Path) -> None:
    """Refuse a place that holds something, or cannot be taken by a folder that is renamed to it.

    Raises:
        ExportError: it says why, and what to do.
    """
    way = folder
    while not way.exists() and way != way.parent:
        way = way.parent
    if not way.is_dir():
        raise ExportError(f"{way}: a file; give a new or an empty folder with {_OTHER}")
    if way == folder and any(folder.iterdir()):
        raise ExportError(f"{folder}: holds something already; give a new or an empty folder with {_OTHER}")
    if folder.is_mount() or folder == Path.cwd():
        what = "a mount point" if folder.is_mount() else "the working directory"
        raise ExportError(f"{folder}: {what}, which cannot be exchanged; give a folder in it with {_OTHER}")
    partial = partial_of(folder)
    if partial.exists() and not (partial / MARK).is_file() and not (partial.is_dir() and not any(partial.iterdir())):
        raise ExportError(
            f"{partial}: no export has written it, and this one is to be written there; move it away, or choose "
            f"another {_OTHER}"
        )


def partial_of(folder: Path) -> Path:
    """Where an export is written before it is in its place."""
    return folder.with_name(f"{folder.name}.partial")


@contextmanager
def hold_partial(folder: Path) -> Iterator[Path]:
    """Hold the place beside while the body writes there; it is gone again where the body leaves nothing in it.

    Raises:
        ConfigError: another process exports to the same place.
        ExportError: it cannot be made.
    """
    partial, made = partial_of(folder), list[Path]()
    try:
        try:
            made = make_folder(partial)
            descriptor = lock_file(partial / MARK, "an export", f"or choose another {_OTHER}")
        except OSError as error:
            raise ExportError(
                f"{folder}: cannot be written to ({error.strerror or error}); choose another {_OTHER}"
            ) from None
        try:
            require_free(folder)  # it may have been taken before this process had the lock
            yield partial
        finally:
            if not partial.exists():
                (folder / MARK).unlink(missing_ok=True)
            elif not any(each.name != MARK for each in partial.iterdir()):
                shutil.rmtree(partial)
            unlock(descriptor)
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()


@contextmanager
def hold_export(folder: Path) -> Iterator[None]:
    """Hold an export that was written while the body looks at it; what is only needed meanwhile is gone afterwards.

    The mark of an export that is not in its place yet stays, for the next export to know whose it is.

    Raises:
        ConfigError: another process does.
        ExportError: it cannot be written to.
    """
    is_marked = (folder / MARK).exists()
    try:
        descriptor = lock_file(folder / MARK, "a verification", "and then give the same command again")
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written to ({error.strerror or error})") from None
    try:
        clear(folder, set())
        yield
    finally:
        if not is_marked:
            (folder / MARK).unlink(missing_ok=True)
        unlock(descriptor)


def clear(folder: Path, names: set[str] | None = None) -> None:
    """Delete what an earlier process has left: all of it, or what was needed for a while and what has these names."""
    for path in folder.iterdir():
        is_kept = names is not None and path.name not in names and not path.name.startswith(SCRATCH)
        if path.name == MARK or is_kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
