"""The best checkpoint of a run, found again where the run directory lies now, and loaded only if it is whole."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.train.checkpoints import best_of


class BestCheckpointHere(TrainerCallback):
    """Puts the best checkpoint's path right when a run is resumed.

    transformers keeps the path as it was when the checkpoint was written, and forgets the best checkpoint where the run
    folder has been moved or is named by another relative path.

    Args:
        run_dir: the run directory as it is named now.
        resumed_from: the checkpoint.
    """

    def __init__(self, run_dir: Path, resumed_from: Path) -> None:
        self.run_dir, self.resumed_from = run_dir, resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the path, if that checkpoint is there."""
        best = best_of(self.resumed_from)
        if best and (self.run_dir / best).is_dir():
            state.best_model_checkpoint = str(self.run_dir / best)
