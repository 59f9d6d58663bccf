"""What a run reads from the disk and leaves on it."""

from dataclasses import dataclass

from expertune.config import RunConfig
from expertune.plan.inventory import FrozenWeights
from expertune.plan.memory import optimizer_bytes
from expertune.plan.settings import Settings, training_argument
from expertune.plan.source import Source


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


def count_disk(
    config: RunConfig, source: Source, weights: FrozenWeights, num_trainable: int, settings: Settings
) -> Disk:
    """Sizes of a run's files.

    Args:
        config: the run.
        source: the checkpoint.
        weights: bytes of the base model as it is held.
        num_trainable: weights of the adapter.
        settings: what the run file says.
    """
    adapter = num_trainable * settings.adapter_dtype.itemsize
    limit = training_argument(config.training, "save_total_limit")
    folder = source.nbytes if source.holds_nf4 and source.nbytes is not None else weights.frozen_bytes
    return Disk(
        download_bytes=source.nbytes,
        nf4_folder_bytes=folder,
        adapter_bytes=adapter,
        checkpoint_bytes=adapter + optimizer_bytes(num_trainable, settings),
        checkpoints_kept=None if limit is None else int(limit),
    )
