"""What is watched in training: figures, the progress bar, peak memory, chance, the best checkpoint, evaluations."""

import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from expertune.distributed.mesh import Ranks
from expertune.evaluation.objective_figures import LOSS_PARTS, is_objective_figure, shown_objective_figures
from expertune.run.progress import Bar, Bars
from expertune.train.checkpoints import best_of


class History(TrainerCallback, ExportableState):
    """Named series with a figure for each step; saved with each checkpoint, so that a resumed run continues them.

    Attributes:
        series: [step, figure] of every optimizer step by name: `loss`, `learning_rate`, `grad_norm`, `tokens`,
            `seconds` and those of `expert_load.LOAD_FIGURES`, as far as they are known, and whatever else is added.
        expert_tokens: tokens of each expert over the training, as `expert_load.add_tokens` keeps them.
        eval_losses: [step, loss] for every evaluation.
        eval_scores: [step, figures] for every evaluation that answered prompts.
        tokens: real tokens (padding excluded) that training steps have seen.
        seconds: time inside training steps, evaluations and checkpoints excluded.
    """

    def __init__(self) -> None:
        self.series: dict[str, list[list[float]]] = {"loss": []}
        self.expert_tokens: dict[str, Any] = {}
        self.eval_losses: list[list[float]] = []
        self.eval_scores: list[list[Any]] = []
        self.tokens, self.seconds = 0, 0.0
        self._step: dict[str, float] = {}
        self._step_started = 0.0

    @property
    def losses(self) -> list[list[float]]:
        """[step, loss] for every optimizer step."""
        return self.series["loss"]

    @losses.setter  # checkpoints of the first releases hold this one in place of `series`
    def losses(self, losses: list[list[float]]) -> None:
        self.series["loss"] = losses

    def state(self) -> dict[str, Any]:
        """What transformers stores in `trainer_state.json` and gives back at resume."""
        names = ("series", "expert_tokens", "eval_losses", "eval_scores", "tokens", "seconds")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def add(self, name: str, figure: float) -> None:
        """Add a figure to the step that is being taken; those of one name are summed, as micro-batches' losses are."""
        self._step[name] = self._step.get(name, 0) + figure

    def add_up(self, ranks: Ranks, summed: Sequence[str] = ()) -> None:
        """Make the step's figures those of all ranks: the mean of their losses, the sum of tokens and of other ones."""
        names = ("loss", "tokens", *summed)
        loss, *sums = ranks.total([self._step.get(name, 0.0) for name in names])
        self._step |= {"loss": loss / ranks.world_size, **dict(zip(names[1:], sums, strict=True))}

    def drop_step(self) -> None:
        """Forget the figures of the step so far: it is being computed again."""
        self._step = {}

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluation's `loss` and other figures; one that a resumed run repeats is the same and stays single."""
        if not self.eval_losses or self.eval_losses[-1][0] != step:
            self.eval_losses.append([step, metrics["loss"]])
            if scores := {name: value for name, value in metrics.items() if name != "loss"}:
                self.eval_scores.append([step, scores])

    def mean_since(self, step: int, name: str = "loss") -> float | None:
        """Mean of a series over the steps after `step`, exact also across a resume; None where it has none."""
        recent = [figure for at, figure in self.series.get(name, []) if at > step]
        return sum(recent) / len(recent) if recent else None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of training steps."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._step, self._step_started = {}, time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the learning rate before the schedule changes it."""
        self.add("learning_rate", float(kwargs["optimizer"].param_groups[0]["lr"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the step."""
        self.add("seconds", time.perf_counter() - self._step_started)
        self.seconds += self._step["seconds"]
        self.tokens += int(self._step.get("tokens", 0))
        for name, figure in self._step.items():
            self.series.setdefault(name, []).append([state.global_step, figure])


class ProgressBar(TrainerCallback):
    """A bar on a terminal, a bar and a table in a notebook, else a line per log: loss, speed, memory, time left.

    Args:
        history: gives the run's history as it is now.
        bars: where to draw.
    """

    def __init__(self, history: Callable[[], History], bars: Bars) -> None:
        self.history, self._bars = history, bars
        self._bar: Bar | None = None
        self._shown = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        self._shown = self._bars.are_drawn and not args.disable_tqdm
        self._bar = Bar(self._bars, "step", "", stays=True, done=state.global_step, hidden=not self._shown)
        self._bar.update(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(state.global_step, state.max_steps, self._figures())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line: evaluations always, losses where there is no bar."""
        logs, step = logs or {}, f"step {state.global_step}/{state.max_steps}"
        figures = _columns(logs)
        if figures and self._shown and self._bars.add_figures(str(state.global_step), figures):
            return
        if "eval_loss" in logs:
            scores = [f"{name} {value:.3f}" for name, value in _scores(logs).items()]
            self._bars.print("  ".join([step, f"evaluation loss {logs['eval_loss']:.4f}", *scores]))
        elif "loss" in logs and not self._shown:
            left = self._bar.estimate.words if self._bar is not None else ""
            self._bars.print("  ".join(filter(None, [step, self._figures(), left])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing; needed where training ends by an error."""
        if self._bar is not None:
            self._bar.close()

    def _figures(self) -> str:
        history = self.history()
        loss = history.losses[-1][1] if history.losses else float("nan")
        memory = peak_memory_bytes() / 1e9
        figures = [f"loss {loss:.4f}", f"{history.tokens_per_second:,.0f} tokens/s", f"memory {memory:.2f} GB"]
        parts = [each for each in LOSS_PARTS if each.name in history.series]
        for each in (*shown_objective_figures(history.series), *parts):
            figures.append(f"{each.label} {history.series[each.name][-1][1]:.3f}")
        if imbalances := history.series.get("expert_imbalance"):
            figures.append(f"imbalance {imbalances[-1][1]:.2f}")
        return "  ".join(figures)


class AfterEvaluation(TrainerCallback):
    """Calls a function after each evaluation, once the history has its figures.

    Args:
        call: given the trainer's state.
    """

    def __init__(self, call: Callable[[TrainerState], None]) -> None:
        self._call = call

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call it."""
        self._call(state)


class BestCheckpointHere(TrainerCallback):
    """Corrects the best checkpoint's path when a run is resumed.

    transformers keeps the path as it was when the checkpoint was written, and forgets the best checkpoint where the run
    directory has been moved or is named by another relative path.

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


class RandomState:
    """Python's, numpy's and torch's generators as they are now."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Draw from here on what was drawn after this was made."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class OwnRandomness(TrainerCallback):
    """Has a rank drop other inputs than rank 0 does; added on all others. At resume the checkpoint's state is restored.

    Args:
        rank: added to the run's seed.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed: the order of examples has been chosen by now."""
        set_seed(args.seed + self.rank)


def _columns(logs: Mapping[str, float]) -> dict[str, str]:
    """What a log adds to a table of losses and scores, by column."""
    losses = {"training loss": logs.get("loss"), "evaluation loss": logs.get("eval_loss")}
    if set(losses.values()) == {None}:
        return {}
    columns = {name: "" if loss is None else f"{loss:.4f}" for name, loss in losses.items()}
    scores = {name.replace("_", " "): value for name, value in _scores(logs).items()}
    return columns | {name: f"{value:.3f}" for name, value in scores.items()}


def _scores(logs: Mapping[str, float]) -> dict[str, float]:
    """Figures of an evaluation beside its loss: of the objective those that people are shown, and all of the task's."""
    found = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    figures = {each.label: found[each.name] for each in shown_objective_figures(found)}
    return figures | {name: value for name, value in found.items() if name != "loss" and not is_objective_figure(name)}


def peak_memory_bytes() -> int:
    """Peak bytes so far: allocated on the CUDA device if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Evaluations(TrainerCallback):
    """Makes evaluations come before the checkpoint of their step, so that a resumed run has each of them once.

    transformers evaluates `eval_strategy: epoch`, and logs `logging_strategy: epoch`, once the epoch has ended, after
    the checkpoint of its last step: a run that is killed in between would resume without them. Here they come with
    that step.

    Args:
        at_end: evaluate after the last step, whatever the strategy is.
    """

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self._evaluated_at = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request what is due with this step."""
        last = state.global_step >= state.max_steps
        epoch = state.epoch or 0.0
        ends_epoch = last or epoch == int(epoch)
        if ends_epoch and args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
        if ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= epoch:
            control.should_evaluate = True
        if last and self.at_end:
            control.should_evaluate = True
        if control.should_evaluate:
            self._evaluated_at = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cancel the second evaluation of the step, which transformers' own callback has just requested."""
        if self._evaluated_at == state.global_step:
            control.should_evaluate = False
