"""Folders that are given as a model and are none: an NF4 folder that is half written, and a run directory."""

from pathlib import Path

from expertune.errors import CheckpointError
from expertune.run.record import RECORD_NAME

FOLDER_MARK = "expertune.json"
PROGRESS_MARK = "expertune.partial.json"
INDEX_NAME = "model.safetensors.index.json"


def require_model_folder(folder: Path) -> None:
    """Refuse a folder that holds no model, or a part of one alone, before anything of it is read.

    Raises:
        CheckpointError: says what the folder is, and what to do.
    """
    require_finished(folder)
    if (folder / RECORD_NAME).is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a run directory, not a model; give the model that the run was trained on, with "
            f"lora.init_from={folder / 'adapter'} to train its adapter further"
        )


def require_finished(folder: Path) -> None:
    """Refuse an NF4 folder that `expertune quantize` has not finished.

    Raises:
        CheckpointError: it has not.
    """
    if (folder / PROGRESS_MARK).is_file() and not (folder / FOLDER_MARK).is_file():
        raise CheckpointError(
            f"{folder}: this NF4 folder is unfinished; the `expertune quantize` command that started it resumes it"
        )
