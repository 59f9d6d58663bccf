"""The trackers of a run (`training.report_to`): each run has one run of its own in a tracker.

The callbacks are transformers' own. Two things are added: a resumed run continues in the tracker's run from the step
that it had reached, with no point logged twice; and what a run has opened is closed when it ends, also by an error, so
that the next run in the same process does not write into it. Read from transformers 5.20 to 5.24.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)

from expertune.storage import write_json

TRACKERS_NAME = "trackers.json"


class Trackers:
    """What a run logs to its trackers.

    Args:
        trainer: the trainer, with the trackers' callbacks.
        run_dir: the run directory; `trackers.json` in it keeps what a resumed run continues with.
        resumed: whether the run was started before; it continues from a checkpoint or from its first step.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, resumed: bool) -> None:
        self._trainer, self._run_dir = trainer, run_dir
        self._kept: dict[str, Any] = _read(run_dir / TRACKERS_NAME) if resumed else {}
        kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
        self._callbacks = [each for each in trainer.callback_handler.callbacks if kinds and isinstance(each, kinds)]

    @contextmanager
    def open(self, named: bool) -> Iterator[None]:
        """While open, the trackers log the run; they are finished with it, however it ends.

        Args:
            named: the run file names the run, so that its name is not the one that it had when it started.
        """
        if not self._callbacks:
            yield
            return
        if not named:
            self._trainer.args.run_name = self._kept.setdefault("run_name", self._trainer.args.run_name)
        for callback in self._callbacks:
            if isinstance(callback, TensorBoardCallback):
                self._open_tensorboard(callback)
            self._log_once(callback, self._kept.setdefault(type(callback).__name__, {}))
        # Before the trainer's own callback would: that one takes a run which is there.
        close_wandb = self._open_wandb() if any(isinstance(each, WandbCallback) for each in self._callbacks) else None
        self._keep()
        failed = True
        try:
            yield
            failed = False
        finally:
            for callback in self._callbacks:
                # transformers has ended those of a run that succeeded. W&B's would upload the model of one that failed.
                if failed and not isinstance(callback, WandbCallback):
                    self._end(callback)
            if close_wandb is not None:
                with contextlib.suppress(Exception):  # a tracker's own error must not hide how the run ended
                    close_wandb(failed)

    def _open_tensorboard(self, callback: TensorBoardCallback) -> None:
        kept = self._kept.setdefault(type(callback).__name__, {})
        if callback.logging_dir is None:  # TENSORBOARD_LOGGING_DIR
            # The form is transformers' own.
            name = kept.setdefault("folder", f"runs/{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}")
            callback.logging_dir = str(self._run_dir / name)
        if kept.get("told"):
            # It would write the arguments as texts of step 0 once more; the writer comes with the first figures.
            callback.on_train_begin = _nothing

    def _open_wandb(self) -> Callable[[bool], None] | None:
        """Start or continue a run of W&B; returns how it is closed, or None where the run is the caller's own."""
        import wandb

        if wandb.run is not None:
            return None
        kept = self._kept[WandbCallback.__name__]
        given = "WANDB_RUN_ID" in os.environ  # by the user, or by an agent of a sweep
        continues = "id" in kept
        if not given:
            kept.setdefault("id", secrets.token_hex(4))
        wandb.init(
            project=os.getenv("WANDB_PROJECT", "huggingface"),  # as transformers has it
            name=self._trainer.args.run_name,
            id=None if given else kept["id"],
            resume="allow" if continues and not given else None,
        )

        def close(failed: bool) -> None:
            wandb.finish(exit_code=int(failed))

        return close

    def _log_once(self, callback: TrainerCallback, kept: dict[str, Any]) -> None:
        """Have each step logged once, also by a run that repeats steps after it was killed."""
        log, before = callback.on_log, dict(kept.get("told", {}))

        def on_log(
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: Mapping[str, float] | None = None,
            **kwargs: Any,
        ) -> None:
            kind = _kind_of(logs or {})
            if state.global_step <= before.get(kind, -1):
                return
            log(args, state, control, logs=logs, **kwargs)
            kept.setdefault("told", {})[kind] = state.global_step
            self._keep()

        callback.on_log = on_log

    def _keep(self) -> None:
        write_json(self._run_dir / TRACKERS_NAME, self._kept)

    def _end(self, callback: TrainerCallback) -> None:
        trainer = self._trainer
        with contextlib.suppress(Exception):  # as above
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def _kind_of(logs: Mapping[str, float]) -> str:
    """What is logged: each step may be logged once for each kind."""
    if "train_runtime" in logs:
        return "end"
    return "evaluation" if any(name.startswith("eval_") for name in logs) else "step"


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a callback."""


class _OfTracker(BaseModel):
    """What is kept of one tracker."""

    model_config = ConfigDict(strict=True)

    folder: str = ""
    id: str = ""
    told: dict[str, int] = {}

    @field_validator("folder")
    @classmethod
    def _lies_in_the_run_directory(cls, folder: str) -> str:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError("a path that leads out of the run directory")
        return folder


class _Kept(BaseModel):
    """`trackers.json`, which may have come with a received run."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, _OfTracker] = Field(init=False)

    run_name: str | None = None


def _read(path: Path) -> dict[str, Any]:
    """What an earlier start kept; nothing where it is damaged, since trackers decide no result."""
    try:
        return _Kept.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump(exclude_unset=True)
    except (OSError, ValueError, RecursionError):  # pydantic's own is a ValueError
        return {}
