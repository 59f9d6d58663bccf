"""What this project promises of training, as a mixin over transformers' Trainer and over TRL's trainers.

Whole checkpoints, exact resume, no step on values that are not finite, one evaluation, named series of figures, and
another attempt at a step where memory runs out: `class Careful(Promises, trl.SFTTrainer)` has all of them.

Several processes replicate the model, and their gradients are averaged when all of them have computed theirs. torch's
DistributedDataParallel would do so inside of backward, where a rank that runs out of memory leaves the others waiting,
and no step could be run again.

Two private methods of Trainer are overridden here, and those that write in `train/saving.py`, each for want of a public
one. Their signatures, and where the training loop calls them, were read from transformers 5.20 to 5.24;
`tests/train/test_promises.py` fails on a release that changes either.

================  ===================================================================================
`_run_epoch`      no callback can keep an epoch from taking a first step where none is left
`_get_grad_norm`  the norm of the gradients is not handed to `on_pre_optimizer_step`
================  ===================================================================================
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerControl

from expertune.data.split import Batch
from expertune.distributed.mesh import Ranks
from expertune.errors import CheckpointError, ConfigError, NonFiniteGradientError, NonFiniteLossError
from expertune.experts.balance import RouterLosses
from expertune.experts.module import in_lockstep
from expertune.objectives.figures import Figures
from expertune.train.arguments import use_one_gpu
from expertune.train.callbacks import BestCheckpointHere, History, OwnRandomness, RandomState
from expertune.train.checkpoints import find_resume_point, last_good_checkpoint
from expertune.train.exchange import Exchange
from expertune.train.expert_load import LOAD_FIGURES, ExpertLoad, add_tokens
from expertune.train.finite import (
    bad_step,
    gradients_of,
    in_words,
    is_lowered_by_scaler,
    norm_of_gradients,
    not_finite,
    require_finite_weights,
)
from expertune.train.neftune import noisy_embeddings
from expertune.train.offload import activations_on_host
from expertune.train.oom import OutOfMemory
from expertune.train.optim import make_optimizer, wait_once
from expertune.train.own_states import load_own_states
from expertune.train.saving import WholeCheckpoints


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


class Promises(WholeCheckpoints):
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
        require_finite_weights(self.model, self.ranks, self.state.global_step, self.args.output_dir)
        self.ranks.on_main(self.drop_old_checkpoints)  # a run that was killed after its last checkpoint has not
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # the checkpoint that was resumed has taken all steps
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite_gradients(model, norm)
        return norm

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

    def _name_bad_step(self, what: str, examples: list[int]) -> str:
        last = last_good_checkpoint(self.args.output_dir)
        if last.endswith(f"checkpoint-{self.state.global_step}"):
            last += " (the weights that this step began with)"
        return bad_step(what, self.state.global_step + 1, [self.place_of(example) for example in examples], last)
