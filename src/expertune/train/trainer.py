"""transformers' Trainer with what this project promises on top.

Whole checkpoints, exact resume, no NaN steps, and steps that are taken again when memory runs out.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.config.training_keys import unused_keys
from expertune.data.split import Batch
from expertune.errors import CheckpointError, ConfigError, NonFiniteGradientError, NonFiniteLossError
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.storage import storage_errors_named
from expertune.train.best import BestCheckpointHere
from expertune.train.callbacks import History
from expertune.train.checkpoints import STAGING_NAME, last_good_checkpoint, publish, seal, verify
from expertune.train.finite import (
    gradients_of,
    in_words,
    is_lowered_by_scaler,
    norm_of_gradients,
    not_finite,
    trained_weights_of,
)
from expertune.train.offload import activations_on_host
from expertune.train.oom import OutOfMemory, RandomState
from expertune.train.optim import default_optimizer, usable_optimizer

Dataset = Sequence[Mapping[str, Any]]


class Evaluation(Protocol):
    """Evaluation rows, and what a model's figures on them are."""

    @property
    def dataset(self) -> Any:
        """The rows as examples."""

    def metrics(self, step: int) -> dict[str, float]:
        """`loss`, and other figures that the best checkpoint may be chosen by, after an optimizer step."""


class ExpertTrainer(Trainer):
    """Trainer for adapted models.

    Args:
        model: the adapted model.
        args: from `training_arguments`.
        train_dataset: rows with `input_ids`, `labels` and `row_ids`.
        held_out: the evaluation rows, and what a model's figures on them are; None without evaluations.
        collator: makes a micro-batch of rows; must pass `row_ids` through.
        history: filled step by step.
        row_places: says where a row came from, by row id; for the message of a loss that is not finite.
        loss: how the model's loss is taken; None means in chunks, where that is the same.
        recovery: what is done when memory runs out; None means every fallback, without messages.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset,
        held_out: Evaluation | None,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        history: History,
        row_places: Callable[[int], str],
        loss: LanguageModelLoss | None = None,
        recovery: OutOfMemory | None = None,
    ) -> None:
        self.recovery = recovery or OutOfMemory(model, next(model.parameters()).device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=held_out.dataset if held_out else None,
            data_collator=collator,
            callbacks=[history, self.recovery],
        )
        self.row_places = row_places
        self.held_out = held_out
        self.best_loaded: str | None = None
        self.loss = loss or LanguageModelLoss(model)
        if reason := self._needs_logits():
            self.loss.give_up(reason)
        self._staging: Path | None = None
        self._step_row_ids: list[int] = []
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)

    @property
    def history(self) -> History:
        """The run's history; at resume transformers swaps in a copy that the checkpoint held."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, History))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training loop.

        Raises:
            DoesNotFitError: memory ran out, and nothing that could be changed is left; names the last good checkpoint.
            NonFiniteLossError: a loss, a gradient or a weight is not finite; names the same.
        """
        if resumed_from := kwargs.get("resume_from_checkpoint"):
            self.add_callback(BestCheckpointHere(Path(self.args.output_dir), Path(resumed_from)))
        with self.recovery.reraise():
            result = super().train(*args, **kwargs)
        self._require_finite_weights()
        self._drop_old_checkpoints()  # a run that was killed between its last checkpoint and here has not
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' epoch, or nothing where the checkpoint that is resumed from has taken all steps already."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """transformers' evaluation; the one before the first step is not taken again where a run is resumed."""
        if skip_scheduler and self.state.global_step:
            return {}
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        return metrics

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, or of the whole step so far where memory runs out.

        Raises:
            NonFiniteLossError: names the step, the rows and the last good checkpoint.
            DoesNotFitError: see `train`.
        """

        def reset() -> None:
            model.zero_grad()
            self.history.drop_step()
            self._step_row_ids = []

        def compute(part: Batch) -> Tensor:
            return self._forward_and_backward(model, dict(part), num_items_in_batch)

        return self.recovery.step(compute, inputs, reset, self._why_whole(num_items_in_batch))

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """transformers' training step; stops before a loss that is not finite reaches the optimizer."""
        row_ids = inputs.pop("row_ids")
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(self._name_bad_step(f"the loss became {value}", row_ids))
        self._step_row_ids += row_ids
        self.history.add_micro_batch(value, tokens)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss on a micro-batch, without the logits unless its outputs are asked for."""
        with (
            activations_on_host(model) if self.recovery.offload_activations else nullcontext(),
            nullcontext() if return_outputs else self.loss.in_chunks(inputs),
        ):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite_gradients(model, norm)
        return norm

    def _require_finite_gradients(self, model: nn.Module, norm: Tensor | float | None) -> None:
        """Stop before the update that would carry a gradient that is not finite into the adapter."""
        value = norm_of_gradients(model, norm)
        if not math.isfinite(value) and not is_lowered_by_scaler(value, self.accelerator.scaler):
            names = not_finite(gradients_of(model))
            where = f" ({in_words(names)})" if names else ""
            what = f"the norm of the gradients became {value}{where} under a finite loss"
            raise NonFiniteGradientError(self._name_bad_step(what, self._step_row_ids))
        self._step_row_ids = []

    def _require_finite_weights(self) -> None:
        """Refuse to keep an adapter that holds a NaN: finite gradients may still have been divided by zero."""
        if names := not_finite(trained_weights_of(self.model)):
            step = self.state.global_step
            raise NonFiniteGradientError(
                f"the update of step {step} left weights that are not finite ({in_words(names)}); "
                f"{last_good_checkpoint(self.args.output_dir)}. Start a new run with a lower learning_rate and "
                "the optimizer's own training.adam_epsilon"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the mean loss is taken from the history, which a resume does not forget."""
        if "loss" in logs and self.history.losses:
            logged = [entry["step"] for entry in self.state.log_history if "loss" in entry]
            logs["loss"] = self.history.mean_since(logged[-1] if logged else 0)
        if "train_loss" in logs and self.history.losses:
            logs["train_loss"] = self.history.mean_since(0)  # transformers' is that of the steps since a resume
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The run's own evaluation, the same as `expertune evaluate`'s; of the arguments only the prefix is used.

        Raises:
            ConfigError: the trainer was made without evaluation rows.
        """
        if self.held_out is None:
            raise ConfigError("the run has no evaluation rows; set data.eval")
        random_state = RandomState()
        metrics = self.held_out.metrics(self.state.global_step)
        random_state.restore()  # looking on must not change what dropout drops
        self.history.add_evaluation(self.state.global_step, metrics)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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

    def _why_whole(self, num_items_in_batch: Tensor | int | None) -> str | None:
        """Why a micro-batch in parts would be another step, or None."""
        if num_items_in_batch is None:
            return "the model takes its loss over a micro-batch's label tokens, not over the step's"
        if getattr(self.model.config.get_text_config(), "output_router_logits", False):
            return "the router's auxiliary loss (output_router_logits) is not the sum of its parts"
        if self.args.neftune_noise_alpha is not None:
            return "training.neftune_noise_alpha scales noise by a batch's tokens"
        return None

    def _needs_logits(self) -> str | None:
        """Why this trainer cannot do without the model's logits, or None."""
        if self.label_smoother is not None:
            return "training.label_smoothing_factor smooths over all of them"
        if self.args.torch_compile:
            return "training.torch_compile would compile the model with a stand-in for its head"
        return None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written beside and renamed, so that one that failed can be written again.
        self.recovery.retry("checkpoint", lambda: self._write_checkpoint(model, trial))

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite_weights()
        run_dir = Path(self.args.output_dir)
        self._staging = run_dir / STAGING_NAME
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            with storage_errors_named(self._staging):  # while what was written is there to look at
                super()._save_checkpoint(model, trial)
            staged = self._staging / f"checkpoint-{self.state.global_step}"
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == staged:
                self.state.best_model_checkpoint = str(run_dir / staged.name)
                self.state.save_to_json(str(staged / "trainer_state.json"))
            seal(staged)
            publish(staged, run_dir)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self._drop_old_checkpoints()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: transformers would also pickle all arguments, with the hub's token if there is one."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder, state_dict=state_dict)
        if isinstance(self.model, ExpertPeftModel):
            self.model.save_live_factors(folder)

    def _load_best_model(self) -> None:
        """transformers' own, of a checkpoint that is as it was written.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            verify(Path(self.state.best_model_checkpoint))
        except CheckpointError as error:
            raise CheckpointError(
                f"the best checkpoint cannot be taken as the run's result: {error}. --resume takes the steps since the "
                "checkpoint before it again"
            ) from None
        super()._load_best_model()
        self.best_loaded = Path(str(self.state.best_model_checkpoint)).name

    def _drop_old_checkpoints(self) -> None:
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _name_bad_step(self, what: str, row_ids: list[int]) -> str:
        last = last_good_checkpoint(self.args.output_dir)
        if last.endswith(f"checkpoint-{self.state.global_step}"):
            last += " (the weights that this step began with)"
        rows = ", ".join(self.row_places(row_id) for row_id in row_ids[:8])
        more = f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else ""
        return (
            f"{what} in step {self.state.global_step + 1} on {rows}{more}; {last}. Look at these rows, "
            "or start a new run with a lower training.learning_rate (from this adapter, if you like, by lora.init_from)"
        )


def training_arguments(training: Mapping[str, Any], output_dir: str, device: torch.device) -> tuple[Any, list[str]]:
    """TrainingArguments from the run file's `training:` section, with this project's defaults.

    Args:
        training: the section; its keys have been checked.
        output_dir: the run directory.
        device: where the model is.

    Returns:
        The arguments, and a sentence for each value that could not be used as it stands.

    Raises:
        ConfigError: transformers refuses a value.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # YAML 1.1 reads a bare `no` as False.
    values = {key: "no" if key.endswith("_strategy") and value is False else value for key, value in training.items()}
    notes = unused_keys(values, on_cpu=device.type == "cpu")
    # transformers renamed these two; run files may use either name.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if new in known and old in values:
            values[new] = values.pop(old)
    kwargs = (
        "activation_checkpointing_kwargs"
        if "activation_checkpointing_kwargs" in known
        else ("gradient_checkpointing_kwargs")
    )
    # The reentrant variant needs inputs that require gradients, which frozen embeddings do not give.
    given: Any = values.get(kwargs) or {}
    values[kwargs] = {"use_reentrant": False, **given}
    if device.type == "cpu":
        values |= {"use_cpu": True, "fp16": False}
        values.setdefault("dataloader_pin_memory", False)
    elif values.get("use_cpu"):
        raise ConfigError(
            "training.use_cpu is true, but the model is on the GPU that this process sees; hide it with "
            "CUDA_VISIBLE_DEVICES= (nothing after the sign) in the environment, and remove the key"
        )
    named = str(values.get("optim") or default_optimizer(device.type))
    values["optim"] = usable_optimizer(named, device.type)
    if values["optim"] != named:
        notes.append(f"training.optim: {named} needs a CUDA device; using {values['optim']} on this CPU")
    values.setdefault("report_to", "none")
    values.setdefault("disable_tqdm", False)
    values.setdefault("run_name", f"{Path(output_dir).name}-{time.strftime('%Y-%m-%d-%H-%M')}")
    values |= {
        "output_dir": output_dir,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
        # A loss that is not finite stops the run; hiding it from the log would be the opposite.
        "logging_nan_inf_filter": False,
        "save_strategy": values.get("save_strategy", "steps"),
    }
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: transformers refuses a value: {error}") from None
    # Of several GPUs that a process sees, transformers would take all: a batch on each, by nn.DataParallel. It has no
    # argument for one; the attribute was read from releases 5.20 to 5.24, and a test holds it.
    args._n_gpu = min(args.n_gpu, 1)
    return args, notes
