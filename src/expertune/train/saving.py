"""Checkpoints and adapters as a run writes them: the part of `train.promises` that has a disk beneath it.

A checkpoint is written to a directory beside, sealed, and renamed (`train.checkpoints`). Of several processes one
writes, and the states that each has of its own experts become whole for it.

These private methods of transformers' Trainer are overridden, as `train.promises` says:

==================  ===================================================================================
`_save_checkpoint`  `on_save` comes after files have their final names and old checkpoints are deleted
`_get_output_dir`   the directory that `_save_checkpoint` writes to
`_save_rng_state`   of several processes each would write a file; one writes them all
`_load_best_model`  no callback comes before the best checkpoint is loaded
==================  ===================================================================================
"""

import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from expertune.distributed.mesh import Ranks
from expertune.errors import CheckpointError, option
from expertune.storage import storage_errors_named
from expertune.train.checkpoints import STAGING_NAME, publish, seal, verify
from expertune.train.exchange import gather_files, write_adapter
from expertune.train.finite import require_finite_weights
from expertune.train.oom import OutOfMemory
from expertune.train.own_states import states_of_all


class WholeCheckpoints(Trainer):
    """A mixin like `train.promises.Promises`, which is one of these.

    Attributes:
        ranks: the processes of the run.
        oom: what happens when memory runs out.
        best_loaded: folder name of the best checkpoint, once it was loaded at the end of training.
    """

    ranks: Ranks
    oom: OutOfMemory
    best_loaded: str | None = None
    _staging: Path | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: transformers would also pickle all arguments, with the hub's token if there is one."""
        folder = Path(output_dir or self.args.output_dir)
        write_adapter(self.model, folder, self.ranks)
        if self.processing_class is not None:
            self.ranks.on_main(lambda: self.processing_class.save_pretrained(folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def adapter_origin(self) -> dict[str, Any]:
        """Which state of training the adapter is, now that training has ended.

        Returns:
            `step`; `checkpoint`, `metric` and `value` of the best evaluation where its checkpoint was loaded, or None.
        """
        if self.best_loaded is None:
            return {"step": self.state.global_step, "checkpoint": None, "metric": None, "value": None}
        return {
            "step": self.state.best_global_step,
            "checkpoint": self.best_loaded,
            "metric": str(self.args.metric_for_best_model).removeprefix("eval_"),
            "value": self.state.best_metric,
        }

    def drop_old_checkpoints(self) -> None:
        """Delete the checkpoints beyond `save_total_limit`; one rank calls it."""
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.ranks.several:
            self._write_checkpoint(model, trial)  # which all take part in, so that one cannot start it again
        else:
            # Written to a directory beside and renamed, so that it can be written again from its start.
            self.oom.retry("checkpoint", lambda: self._write_checkpoint(model, trial))

    def _save_rng_state(self, output_dir: str) -> None:
        if self.ranks.several:
            gather_files(super()._save_rng_state, Path(output_dir), self.ranks)
        else:
            super()._save_rng_state(output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        try:
            verify(best)
        except CheckpointError as error:
            raise CheckpointError(
                f"the best checkpoint cannot be taken as the run's result: {error}. {option('resume')} takes "
                "the steps since the checkpoint before it again"
            ) from None
        super()._load_best_model()
        self.best_loaded = best.name

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite_weights(self.model, self.ranks, self.state.global_step, self.args.output_dir)
        run_dir = Path(self.args.output_dir)
        self._staging = run_dir / STAGING_NAME
        self.ranks.on_main(self._drop_staging)
        try:
            whole = nullcontext() if self.args.save_only_model else self._states_of_all()
            with storage_errors_named(self._staging), whole:  # while what was written is there to look at
                super()._save_checkpoint(model, trial)
            staged = self._staging / f"checkpoint-{self.state.global_step}"
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == staged:
                self.state.best_model_checkpoint = str(run_dir / staged.name)
                self.ranks.on_main(lambda: self.state.save_to_json(str(staged / "trainer_state.json")))
            self.ranks.wait()  # all have come as far
            self.ranks.on_main(partial(_publish, staged, run_dir))
        finally:
            self.ranks.on_main(self._drop_staging)
            self._staging = None
        self.ranks.on_main(self.drop_old_checkpoints)
        self.ranks.wait()

    def _states_of_all(self) -> AbstractContextManager[None]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return states_of_all(self.model, optimizer, here=self.ranks.writes)

    def _drop_staging(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)


def _publish(staged: Path, run_dir: Path) -> None:
    seal(staged)
    publish(staged, run_dir)
