"""What this project promises of training, as a mixin over transformers' Trainer and over TRL's trainers.

Whole checkpoints, exact resume, no step on values that are not finite, one evaluation, named series of figures, and
another attempt at a step where memory runs out: `class Careful(Promises, trl.SFTTrainer)` has all of them.

Several processes replicate the model, and their gradients are averaged when all of them have computed theirs. torch's
DistributedDataParallel would do so inside of backward, where a rank that runs out of memory leaves the others waiting,
and no step could be run again.

These private methods of Trainer are overridden, each for want of a public one. Their signatures, and where the training
loop calls them, were read from transformers 5.20 to 5.24; `tests/train/test_promises.py` fails on a release that
changes either.

==================  ===================================================================================
`_run_epoch`        no callback can keep an epoch from taking a first step where none is left
`_get_grad_norm`    the norm of the gradients is not handed to `on_pre_optimizer_step`
`_save_checkpoint`  `on_save` comes after files have their final names and old checkpoints are deleted
`_get_output_dir`   the directory that `_save_checkpoint` writes to
`_save_rng_state`   of several processes each would write a file; one writes them all
`_load_best_model`  no callback comes before the best checkpoint is loaded
==================  ===================================================================================
"""

import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import rotate_checkpoints

from expertune.data.split import Batch
from expertune.distributed.mesh import Ranks
from expertune.errors import CheckpointError, ConfigError, NonFiniteGradientError, NonFiniteLossError, option
from expertune.experts.balance import RouterLosses
from expertune.experts.module import in_lockstep
from expertune.objectives.figures import Figures
from expertune.storage import storage_errors_named
from expertune.train.arguments import use_one_gpu
from expertune.train.callbacks import BestCheckpointHere, History, OwnRandomness, RandomState
from expertune.train.checkpoints import (
    STAGING_NAME,
    find_resume_point,
    last_good_checkpoint,
    publish,
    seal,
    verify,
)
from expertune.train.exchange import Exchange, gather_files, write_adapter
from expertune.train.expert_load import LOAD_FIGURES, ExpertLoad, add_tokens
from expertune.train.finite import (
    bad_step,
    gradients_of,
    in_words,
    is_lowered_by_scaler,
    norm_of_gradients,
    not_finite,
    trained_weights_of,
)
from expertune.train.neftune import noisy_embeddings
from expertune.train.offload import activations_on_host
from expertune.train.oom import OutOfMemory
from expertune.train.optim import make_optimizer, wait_once
from expertune.train.own_states import load_own_states, states_of_all


class Evaluation(Protocol):
    """The evaluation of a run."""

    @property
    def dataset(self) -> Any:
        """The examples of the evaluation."""

    def metrics(self, step: int) -> dict[str, float]:
        """`loss`, and other figures that the best checkpoint may be chosen by, after an optimizer step."""


@dataclass
class Promised:
    """What the promises are kept with; all of it has a default.

    Attributes:
        history: filled step by step.
        oom: what happens when memory runs out; None means all fallbacks, without a message.
        evaluation: the run's own evaluation; None means the trainer's.
        place_of: where an example came from, by its id in `example_ids` of a batch; for messages.
        ranks: the processes of the run.
        loraplus_lr_ratio: learning rate of factors B over that of A (LoRA+); None means that they have the same.
        figures: what the loss adds to them becomes series of the history, by the same names.
        router_losses: auxiliary losses of the routers, for trainers that take them; None for none.
    """

    history: History = field(default_factory=History)
    oom: OutOfMemory | None = None
    evaluation: Evaluation | None = None
    place_of: Callable[[int], str] = str
    ranks: Ranks = field(default_factory=Ranks)
    loraplus_lr_ratio: float | None = None
    figures: Figures = field(default_factory=Figures)
    router_losses: RouterLosses | None = None


class Promises(Trainer):
    """The mixin; it comes before the trainer's class among the bases.

    Args:
        *args: of the trainer.
        promised: see there.
        **kwargs: of the trainer.
    """

    def __init__(self, *args: Any, promised: Promised | None = None, **kwargs: Any) -> None:
        promised = promised or Promised()
        self.evaluation, self.place_of, self.ranks = promised.evaluation, promised.place_of, promised.ranks
        self._loraplus_lr_ratio = promised.loraplus_lr_ratio
        self.figures = promised.figures
        self.best_loaded: str | None = None
        self._staging: Path | None = None
        self._step_examples: list[int] = []
        self._stands_by = False
        self._summed: tuple[str, ...] = ()  # further series that are a step's sum over ranks
        super().__init__(*args, **kwargs)
        use_one_gpu(self.args)
        self.neftune_noise_alpha = None  # transformers' own hook stays off: see `expertune.train.neftune`
        self._train_batch_size = self.args.train_batch_size
        self.oom = promised.oom or OutOfMemory(self.model, next(self.model.parameters()).device, ranks=self.ranks)
        self._exchange = Exchange(self.model, self.ranks)
        self._exchange.require_same_step(self.args)
        if self._exchange.parallel:
            self.accelerator.clip_grad_norm_ = self._exchange.clip
        self.expert_load = ExpertLoad()
        for callback in (promised.history, self.oom):
            self.add_callback(callback)
        if self.ranks.rank:
            self.add_callback(OwnRandomness(self.ranks.rank))
        self.args.restore_callback_states_from_checkpoint = True  # the history's
        self.args.logging_nan_inf_filter = False  # such a loss stops the run, and is not hidden in the log

    @property
    def history(self) -> History:
        """The run's history; at resume transformers puts a copy that the checkpoint held in its place."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, History))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """transformers' training loop.

        Args:
            resume_from_checkpoint: a checkpoint; True means the newest whole one.
            **kwargs: as transformers has them.

        Raises:
            CheckpointError: there is no whole checkpoint to resume from.
            DoesNotFitError: memory ran out, and no fallback is left; names the last good checkpoint.
            NonFiniteLossError, NonFiniteGradientError: a loss, a gradient or a weight is not finite; name the same.
        """
        run_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            if (whole := find_resume_point(run_dir).checkpoint) is None:
                raise CheckpointError(f"{run_dir}: no whole checkpoint to resume from; train without resuming")
            resume_from_checkpoint = str(whole)
        if resume_from_checkpoint:
            self.add_callback(BestCheckpointHere(run_dir, Path(resume_from_checkpoint)))
            self.args.eval_on_start = False  # that evaluation is in the history
        self._exchange.copy_weights()
        noise = noisy_embeddings(self.model, self.args.neftune_noise_alpha)
        with self.oom.reraise(), self.expert_load.watching(self.model), noise:
            result = super().train(resume_from_checkpoint, **kwargs)
        self._require_finite_weights()
        self.ranks.on_main(self._drop_old_checkpoints)  # a run that was killed after its last checkpoint has not
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, or of the whole step so far where memory runs out.

        Raises:
            NonFiniteLossError: names the step, the examples and the last good checkpoint.
            DoesNotFitError: see `train`.
        """

        def reset() -> None:
            model.zero_grad()
            self.history.drop_step()
            self.expert_load.clear()
            self.figures.clear()
            self._step_examples = []

        def compute(part: Batch) -> Tensor:
            return self._forward_and_backward(model, dict(part), num_items_in_batch)

        loss = self.oom.step(compute, inputs, reset, self.why_indivisible(num_items_in_batch))
        if self.ranks.several and self.accelerator.sync_gradients:
            self._exchange.average_gradients()
            self.history.add_up(self.ranks, self._summed)
            self.expert_load.add_up(self.ranks)
            self.figures.add_up()
        return loss

    def why_indivisible(self, num_items_in_batch: Tensor | int | None) -> str | None:
        """Why a micro-batch computed in parts, split between its sequences, would be another step; None if it is not.

        Args:
            num_items_in_batch: the label tokens of the step where the loss is divided by them, else None.
        """
        return f"{type(self).__name__} does not say how its batches divide"

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate prepares the model without DistributedDataParallel."""
        super().create_accelerator_and_postprocess()
        if self.ranks.several:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)  # which leaves autocast as it is

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The run's; what it loads is the part of a checkpoint that belongs to this rank's experts."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = make_optimizer(self.model, self.args, self._loraplus_lr_ratio)
        optimizer = super().create_optimizer(*args, **kwargs)
        wait_once(optimizer)
        load_own_states(self.model, optimizer)
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss, with activations offloaded where that is set or memory ran out."""
        with activations_on_host(model) if self.oom.offload_activations else nullcontext():
            computed = super().compute_loss(model, inputs, *args, **kwargs)
        return computed * 0 if self._stands_by else computed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; means of the loss and of the experts' load are the history's, which a resume does not forget."""
        if "loss" in logs and self.history.losses:
            logged = [entry["step"] for entry in self.state.log_history if "loss" in entry]
            for name in ("loss", *LOAD_FIGURES, *self.figures.names):
                if (mean := self.history.mean_since(logged[-1] if logged else 0, name)) is not None:
                    logs[name] = mean
        if "train_loss" in logs and (mean := self.history.mean_since(0)) is not None:
            logs["train_loss"] = mean  # transformers' is that of the steps since a resume
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The run's own evaluation, the same as `expertune evaluate`'s, or else the trainer's.

        Raises:
            ConfigError: the trainer was made without evaluation examples.
        """
        if self.evaluation is None and not args and "eval_dataset" not in kwargs and self.eval_dataset is None:
            raise ConfigError("the run has no evaluation examples; set data.eval")
        step, random_state = self.state.global_step, RandomState()
        metrics: dict[str, float]
        if self.evaluation is None:
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if (loss := metrics.get(f"{metric_key_prefix}_loss")) is not None:
                self.history.add_evaluation(step, {"loss": loss})
        else:
            found = self.evaluation.metrics(step)
            self.history.add_evaluation(step, found)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(metrics)
            handler = self.callback_handler
            self.control: TrainerControl = handler.on_evaluate(self.args, self.state, self.control, metrics)
        random_state.restore()  # an evaluation must not change what dropout drops
        return metrics

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # the checkpoint that was resumed has taken all steps
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite_gradients(model, norm)
        return norm

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

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """The trainer's step; stops before a loss that is not finite reaches the optimizer."""
        examples = inputs.pop("example_ids", [])
        ids = inputs.get("input_ids")
        if ids is not None and not ids.numel():  # of several ranks, one that the last examples did not suffice for
            return self._stand_by(model, num_items_in_batch)
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(self._name_bad_step(f"the loss became {value}", examples))
        self._step_examples += examples
        self.history.add("loss", value)
        self.history.add("tokens", tokens)
        return loss

    def _stand_by(self, model: nn.Module, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Take part in what the other ranks compute, where they need this one's part of the experts; adds nothing."""
        nothing = torch.zeros((), device=self.args.device)
        if not in_lockstep(self.model):
            return nothing
        inputs = self.data_collator([self.train_dataset[0]])
        inputs.pop("example_ids", None)
        self._stands_by = True
        try:
            with self.expert_load.ignoring():
                super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._stands_by = False
        return nothing

    def _require_finite_gradients(self, model: nn.Module, norm: Tensor | float | None) -> None:
        """Stop before the update that would carry a gradient that is not finite into the adapter."""
        value = norm_of_gradients(model, norm)
        if not math.isfinite(value) and not is_lowered_by_scaler(value, self.accelerator.scaler):
            of_ranks = self.ranks.gather(not_finite(gradients_of(model)))
            names = list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank))
            where = f" ({in_words(names)})" if names else ""
            what = f"the norm of the gradients became {value}{where} under a finite loss"
            examples = [example for of_rank in self.ranks.gather(self._step_examples) for example in of_rank]
            raise NonFiniteGradientError(self._name_bad_step(what, examples))
        self._step_examples = []
        self.history.add("grad_norm", value)
        figures, tokens = self.expert_load.take()
        for name, figure in (figures | self.figures.take()).items():
            self.history.add(name, figure)
        add_tokens(self.history.expert_tokens, self.state.global_step + 1, tokens)

    def _require_finite_weights(self) -> None:
        """Refuse to keep an adapter that holds a NaN: finite gradients may still have been divided by zero."""
        # Of experts that are shared out each rank has its own, and all have to stop.
        of_ranks = self.ranks.gather(not_finite(trained_weights_of(self.model)))
        if names := list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank)):
            step = self.state.global_step
            raise NonFiniteGradientError(
                f"the update of step {step} left weights that are not finite ({in_words(names)}); "
                f"{last_good_checkpoint(self.args.output_dir)}. Start a new run with a lower learning_rate and "
                "the optimizer's own training.adam_epsilon"
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite_weights()
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
        self.ranks.on_main(self._drop_old_checkpoints)
        self.ranks.wait()

    def _states_of_all(self) -> AbstractContextManager[None]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return states_of_all(self.model, optimizer, here=self.ranks.writes)

    def _drop_staging(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _drop_old_checkpoints(self) -> None:
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _name_bad_step(self, what: str, examples: list[int]) -> str:
        last = last_good_checkpoint(self.args.output_dir)
        if last.endswith(f"checkpoint-{self.state.global_step}"):
            last += " (the weights that this step began with)"
        return bad_step(what, self.state.global_step + 1, [self.place_of(example) for example in examples], last)


def _publish(staged: Path, run_dir: Path) -> None:
    seal(staged)
    publish(staged, run_dir)
