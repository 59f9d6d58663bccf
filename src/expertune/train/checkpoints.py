"""Run checkpoints that are whole or absent.

A checkpoint is written to a directory of another name, sealed with a manifest of every file's size and sha256, flushed
to disk, and only then renamed to `checkpoint-N`. What a kill leaves behind is never picked up; what a disk damages no
longer matches its manifest, and is refused by name.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from expertune.checkpoint.adapter_folder import ADAPTER_FILES
from expertune.errors import CheckpointError, ConfigError
from expertune.storage import hash_file, write_json

MANIFEST_NAME = "manifest.json"
STAGING_NAME = ".checkpoint-being-written"

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


@dataclass
class ResumePoint:
    """Where a run continues.

    Attributes:
        checkpoint: the newest whole checkpoint, or None to start from the first step.
        refused: why newer ones were not taken, one sentence each.
    """

    checkpoint: Path | None
    refused: list[str] = field(default_factory=list)


def seal(folder: Path) -> None:
    """Write the manifest of a finished checkpoint folder and flush every file to disk."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        _flush(path)
    write_json(folder / MANIFEST_NAME, {name: hash_file(path).to_json() for name, path in files.items()})


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: names the checkpoint and the file that is missing or damaged.
    """
    manifest = _read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if not path.is_dir()} - {
        MANIFEST_NAME
    }
    for name in sorted(manifest.keys() - present):
        raise CheckpointError(f"{folder}: damaged: {name} is missing")
    for name in sorted(present - manifest.keys()):
        raise CheckpointError(f"{folder}: damaged: {MANIFEST_NAME} does not name {name}")
    for name, (size, digest) in manifest.items():
        path = folder / name
        if path.stat().st_size != size or hash_file(path).sha256 != digest:
            raise CheckpointError(f"{folder}: damaged: {name} is not the file that was written")


def sealed_adapter(folder: Path) -> dict[str, str] | None:
    """What `adapter_digests` gave of a checkpoint when it was sealed; None of a folder that is no checkpoint.

    Raises:
        CheckpointError: its manifest is damaged.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    return {name: digest for name, (_, digest) in _read_manifest(folder).items() if name in ADAPTER_FILES}


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name. A manifest that a disk has changed is refused."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        read = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; the checkpoint was never finished") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder}: damaged: {MANIFEST_NAME} is not the file that was written") from None
    if not read:
        raise CheckpointError(f"{folder}: damaged: {MANIFEST_NAME} names no file")
    return read


def publish(staged: Path, run_dir: Path) -> Path:
    """Move a sealed checkpoint to its place in the run directory, and return that place."""
    target = run_dir / staged.name
    if target.exists():
        # Only a checkpoint that was refused at resume can stand in the way of its own step.
        shutil.rmtree(target)
    staged.rename(target)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest step first; damaged ones included."""
    found = [(int(match[1]), path) for path in run_dir.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found)]


def last_good_checkpoint(run_dir: str | Path) -> str:
    """The newest checkpoint of a run, as part of an error message."""
    checkpoints = list_checkpoints(Path(run_dir))
    return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"


def find_resume_point(run_dir: Path, ends_with_best: bool = False) -> ResumePoint:
    """The newest checkpoint that is whole; damaged ones are skipped and named.

    Removes what a kill left half-written.

    Args:
        run_dir: the run directory.
        ends_with_best: the run ends with the best checkpoint, which then has to be whole as well.
    """
    shutil.rmtree(run_dir / STAGING_NAME, ignore_errors=True)
    point = ResumePoint(None)
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            verify(folder)
            best = best_of(folder) if ends_with_best else None
            if best and best != folder.name:
                _verify_best(folder, run_dir / best)
        except CheckpointError as error:
            point.refused.append(str(error))
            continue
        point.checkpoint = folder
        break
    return point


def _verify_best(checkpoint: Path, best: Path) -> None:
    """Raises CheckpointError where a run that resumes from a checkpoint could not end with its best one."""
    if not best.is_dir():
        raise CheckpointError(f"{checkpoint}: the best checkpoint so far was {best.name}, which is missing")
    try:
        verify(best)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: the best checkpoint so far was {best.name}: {error}") from None


def best_of(checkpoint: Path) -> str | None:
    """The folder name of the best checkpoint so far, as a checkpoint's trainer_state.json has it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    return Path(best).name if best else None


def require_state_to_go_on(checkpoint: Path) -> None:
    """Refuse a checkpoint from which the remaining steps would differ from those of an uninterrupted run.

    Raises:
        ConfigError: steps are left to take, and the checkpoint has no optimizer state.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] < state["max_steps"] and not (checkpoint / "optimizer.pt").is_file():
        raise ConfigError(
            f"resume: {checkpoint} holds the adapter without the optimizer's state (training.save_only_model), so "
            f"that the remaining steps would be other ones; start a new run from it by lora.init_from={checkpoint}, or "
            "start over in another output_dir"
        )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
