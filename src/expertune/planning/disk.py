"""What a run reads from the disk and leaves on it, and whether there is room for that."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertune.config import RunConfig
from expertune.errors import StorageError
from expertune.planning.settings import Workload
from expertune.planning.shapes import Source
from expertune.text import format_size
from expertune.train.arguments import training_argument
from expertune.train.schedule import checkpoints_at_once


@dataclass(frozen=True)
class Disk:
    """Sizes of files by their tensors; headers and tokenizers, a few MB, are left out.

    Attributes:
        download_bytes: the checkpoint; None where nothing says.
        nf4_folder_bytes: the folder that `expertune quantize` writes of it.
        adapter_bytes: the adapter.
        checkpoint_bytes: one checkpoint of the run: the adapter and the optimizer's states.
        checkpoints_kept: `training.save_total_limit`, or None: all that `save_steps` asks for.
    """

    download_bytes: int | None
    nf4_folder_bytes: int
    adapter_bytes: int
    checkpoint_bytes: int
    checkpoints_kept: int | None


def count_disk(config: RunConfig, w: Workload, source: Source) -> Disk:
    """Sizes of a run's files, which are those of one process.

    Args:
        config: the run.
        w: what runs, the whole model in one process.
        source: the checkpoint.
    """
    limit = training_argument(config.training, "save_total_limit")
    frozen_bytes = w.inventory.weights.frozen_bytes
    return Disk(
        download_bytes=source.nbytes,
        nf4_folder_bytes=source.nbytes or frozen_bytes if source.holds_nf4 else frozen_bytes,
        adapter_bytes=w.written_bytes + w.first_bytes,  # the first factors once
        checkpoint_bytes=w.written_bytes + w.optimizer_bytes,
        checkpoints_kept=None if limit is None else int(limit),
    )


def require_room(disk: Disk, training: Mapping[str, Any], num_examples: int, run_dir: Path) -> None:
    """Refuse a run whose adapter and checkpoints do not fit on the disk, before it has computed for hours.

    Args:
        disk: the plan's sizes.
        training: the run file's `training:` section.
        num_examples: examples of the training data set (packs, with `packing: packed`).
        run_dir: the run directory; what it holds of a run that resumes is not needed a second time.

    Raises:
        StorageError: says what the run will write and what is free.
    """
    count = checkpoints_at_once(training, num_examples)
    held = sum(path.stat().st_size for path in run_dir.glob("checkpoint-*/*") if path.is_file())
    needed = disk.adapter_bytes + max(count * disk.checkpoint_bytes - held, 0)
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        sizes = [format_size(nbytes) for nbytes in (needed, disk.adapter_bytes, disk.checkpoint_bytes, free)]
        raise StorageError(
            f"{run_dir}: the run will write {sizes[0]} here (adapter {sizes[1]}, up to {count} checkpoints of "
            f"{sizes[2]} at once), and {sizes[3]} are free; make room, lower training.save_total_limit, or choose "
            "another output_dir"
        )
