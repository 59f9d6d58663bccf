"""A run's adapter as the run has written it; files that have changed since are refused."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from expertune.checkpoint.adapter_folder import adapter_digests
from expertune.errors import CheckpointError, option
from expertune.run.record import RECORD_NAME, RunRecord
from expertune.train.checkpoints import sealed_adapter

ADAPTER_FOLDER = "adapter"

_AS_IT_IS = "a copy outside of the run directory is taken as it is"

TO_START_FROM = f"restore it, or start from another state of the run; {_AS_IT_IS}"
TO_LOAD = f"restore it, or load another state of the run; {_AS_IT_IS}"
TO_OPEN = (
    f"restore it, or take another state of the run with {option('adapter', 'checkpoint-N')}. To use it as it is, copy "
    "it out of the run directory, and start from the copy with lora.init_from, or put it on a model with "
    "expertune.load_adapter"
)
TO_RESUME = (
    "restore it, or remove the folder, which is then written again by resuming from the newest whole checkpoint, or "
    "from the first step where there is none"
)
"""What to do about an adapter that is not as its run wrote it, by what was to be done with it."""


def whole_adapter(folder: Path, remedy: str) -> dict[str, str]:
    """What `adapter_digests` gives of an adapter, held to what its run has written.

    A checkpoint is held to its manifest, the final adapter to the record beside it. Nothing says what an adapter has to
    be that was taken out of its run, or that an earlier release wrote.

    Args:
        folder: the adapter's.
        remedy: what to do where it is damaged: one of the constants above.

    Raises:
        CheckpointError: a file has changed, is missing, or has come to it.
    """
    digests, written = adapter_digests(folder), sealed_adapter(folder) or _recorded_adapter(folder)
    for name in sorted({*digests, *written}) if written else ():
        if digests.get(name) != written.get(name):
            raise CheckpointError(
                f"{folder}: damaged: {name} is {'not the file that' if name in digests else 'missing, which'} the run "
                f"wrote; {remedy}"
            )
    return digests


def _recorded_adapter(folder: Path) -> Mapping[str, str]:
    """What the record says of a run's final adapter; nothing of another folder, or where no record lies beside it.

    Of a link, the record beside it or beside what it leads to.
    """
    for path in (folder, folder.resolve()):
        if path.name == ADAPTER_FOLDER and (path.parent / RECORD_NAME).is_file():
            with suppress(CheckpointError):
                recorded = RunRecord.load(path.parent).section("adapter").get("sha256")
                return recorded if isinstance(recorded, Mapping) else {}
    return {}
