"""What runs out of memory is run again with the next fallback: an optimizer step as a whole, from its start.

The fallbacks are gate and up that are not kept for backward, then smaller batches, then activations offloaded to the
host, then more experts offloaded. A change is recorded, holds for the rest of the run, and is repeated at the same step
when the run resumes. Evaluation, generation and the preflight check use smaller batches in the same way. Optimizer
states are allocated before the first step.

Of several processes all run a step again where memory runs out on one (`votes.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.data.split import Batch, halve, size, split
from expertune.distributed.mesh import Ranks
from expertune.errors import DoesNotFitError, option
from expertune.experts.module import keep_inner
from expertune.kernels.routes import settings_of
from expertune.placement.experts import placement_of
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory
from expertune.train.callbacks import RandomState, peak_memory_bytes
from expertune.train.checkpoints import last_good_checkpoint
from expertune.train.offload import has_separate_host
from expertune.train.optim import allocate_states
from expertune.train.votes import ELSEWHERE, Phase, Votes, attempt

_Result = TypeVar("_Result")

FREED = "unused memory was freed"

# Phases that compute on batches: the setting that bounds a batch, and what a change of it is called.
_LIMITS: dict[Phase, tuple[str, str]] = {
    "training": ("micro_batch_tokens", "micro-batches of at most {} tokens, or a single sequence"),
    "evaluation": ("evaluation_tokens", "evaluation batches of at most {} tokens, or a single sequence"),
    "preflight": ("preflight_tokens", "a preflight check on at most {} tokens, or a single sequence"),
    "generation": ("generation_rows", "prompts answered at once: at most {}"),
}


@dataclass(frozen=True)
class Change:
    """What was changed when memory ran out; the run's record holds it under `train.recoveries`.

    Attributes:
        step: the optimizer step that was being taken, or had been taken last; 0 before the first.
        during: the phase; older records may name others.
        error: what the allocator reported.
        change: what is different from then on, in words.
        setting: the same by name: `micro_batch_tokens`, `evaluation_tokens`, `preflight_tokens`, `generation_rows`,
            `kept_layers`, `offload_activations` or `demoted` (more experts offloaded); empty where freeing memory was
            enough.
    """

    step: int
    during: str
    error: str
    change: str
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For the terminal."""
        now = f"from here on {self.change}" if self.setting else self.change
        return f"{_when(self.during, self.step)} ran out of memory ({self.error}); {now}"

    @property
    def is_within_step(self) -> bool:
        """Whether it was made before the step's update, not after it."""
        return self.during in ("training", "clipping", "optimizer")

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return asdict(self)


class OutOfMemory(TrainerCallback):
    """Runs again what ran out of memory, or raises DoesNotFitError where no fallback is left.

    It is a callback because it has to know where a step starts.

    Args:
        model: the model, adapted or not.
        device: the device that computes.
        offload: activations are offloaded from the start.
        earlier: changes that the run made before it was interrupted, as `Change.to_json` returned them.
        notify: called with each change.
        ranks: the run's processes.

    Attributes:
        run_dir: the directory with the run's checkpoints; None outside of a run.
        limits: the largest batch that is computed at once, by the name of its setting; a single sequence may be larger.
        offload_activations: what forward saves for backward is held on the host.
        kept_layers: expert layers that keep gate and up from forward for backward.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: bool = False,
        earlier: Sequence[dict[str, Any]] = (),
        notify: Callable[[Change], None] = lambda _: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.device = device
        self.run_dir: str | None = None
        self.limits: dict[str, int] = {}
        self.offload_activations = offload and has_separate_host(device)
        self.kept_layers = 0
        self._model, self._notify, self.ranks = model, notify, ranks or Ranks()
        self._votes = Votes(model, self.ranks)
        self._earlier = sorted((Change(**change) for change in earlier), key=lambda change: change.step)
        self._tried: list[str] = []
        self._batches: list[Batch] = []
        self._returned: Tensor | float = 0.0
        self._start_step(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allocate the optimizer's states, those of a checkpoint aside."""
        self._step = state.global_step + 1
        self.retry("optimizer", lambda: allocate_states(kwargs["optimizer"]))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where the step starts, to run it again from there."""
        self.run_dir = str(args.output_dir)
        self._start_step(state.global_step + 1)
        self._repeat_earlier(and_after=False)

    @contextmanager
    def keeping(self, num_layers: int) -> Iterator[None]:
        """While open, the last expert layers keep gate and up for backward, unless memory runs out."""
        self._keep(num_layers)
        try:
            yield
        finally:
            self._keep(0)

    def step(
        self, compute: Callable[[Batch], Tensor], batch: Batch, reset: Callable[[], None], why_whole: str | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, or of the step's micro-batches so far if memory runs out.

        Args:
            compute: forward and backward of a micro-batch or a part of one; returns its share of the step's loss.
            batch: the micro-batch.
            reset: undoes what the step has done so far: gradients and counts.
            why_whole: why micro-batches cannot be split; None where they can.

        Returns:
            What this micro-batch adds to the losses that were returned in this step.
        """
        self._batches.append(batch)

        def start_over() -> list[Batch]:
            reset()
            self._random.restore()
            return self._batches

        losses, taken_again = self._until_it_fits("training", compute, [batch], start_over, why_whole)
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        added = total - self._returned if taken_again else total
        self._returned = self._returned + added
        return added

    def look_ahead(
        self, compute: Callable[[Batch], _Result], batches: Sequence[Batch], why_whole: str | None = None
    ) -> list[_Result]:
        """What `compute` returns for all parts of a step's micro-batches, before the first of them is computed.

        The step then draws the random numbers that were drawn here. Arguments otherwise as for `step`.
        """

        def start_over() -> Sequence[Batch]:
            self._random.restore()
            return batches

        results, _ = self._until_it_fits("training", compute, batches, start_over, why_whole)
        self._random.restore()
        return results

    def in_parts(self, phase: Phase, compute: Callable[[Any], _Result], batch: Any, step: int) -> list[_Result]:
        """What `compute` returns for a batch of an evaluation or for a list of prompts, part by part.

        `step` is the optimizer step that was taken last; 0 before the first.
        """
        taken, self._step = self._step, step
        try:
            self._repeat_earlier(and_after=True)
            return self._until_it_fits(phase, compute, [batch], lambda: [batch])[0]
        finally:
            self._step = taken

    def preflight(self, compute: Callable[[Batch], _Result], batch: Batch) -> tuple[_Result, dict[str, Any]]:
        """What `compute` returns for as much of the preflight check's batch as fits, and that part of the batch."""
        self._repeat_earlier(and_after=True)

        def first() -> list[Batch]:
            part = split(batch, self.limits.get("preflight_tokens"))[0]
            return [{name: value for name, value in part.items() if isinstance(value, Tensor)}]

        results, _ = self._until_it_fits("preflight", lambda part: (compute(part), dict(part)), first(), first)
        return results[0]

    def retry(self, phase: Phase, do: Callable[[], _Result]) -> _Result:
        """Do something as a whole, again where memory runs out, with no change that could alter its result."""
        freed = False
        while True:
            result, error = attempt(do)
            if not self._failed(phase, error):
                return result  # type: ignore[return-value]
            if freed:
                self._fall_back(phase, error)
            else:
                self._notify(Change(self._step, phase, error or ELSEWHERE, FREED))
            freed = True

    @contextmanager
    def reraise(self) -> Iterator[None]:
        """Memory that runs out anywhere else (in an update, collating, logging) ends the run with one clear error."""
        try:
            yield
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            report = in_one_line(error)
        raise self._error(f"step {self._step}", report, " where nothing is run again, and the adapter is not saved")

    def _keep(self, num_layers: int) -> None:
        self.kept_layers = num_layers
        keep_inner(self._model, num_layers)

    def _start_step(self, step: int) -> None:
        self._step, self._random = step, RandomState()
        self._batches, self._returned = [], 0.0

    def _until_it_fits(
        self,
        phase: Phase,
        compute: Callable[[Any], _Result],
        batches: Sequence[Any],
        start_over: Callable[[], Sequence[Any]],
        why_whole: str | None = None,
    ) -> tuple[list[_Result], bool]:
        """The results of all parts of all batches, and whether it took more than one attempt."""
        part: Any = None

        def compute_all() -> list[_Result]:
            nonlocal part
            results = []
            for batch in batches:
                parts = split(batch, self.limits.get(_LIMITS[phase][0]))
                num_idle = self._votes.num_idle(len(parts)) if _LIMITS[phase][0] in self.limits else 0
                for part in parts:
                    results.append(compute(part))
                part, idle = None, _nothing_of(parts[0]) if phase == "training" else parts[0]
                for _ in range(num_idle):
                    compute(idle)
            return results

        taken_again = False
        while True:
            results, error = attempt(compute_all)
            if not self._failed(phase, error):
                return results, taken_again  # type: ignore[return-value]
            self._fall_back(phase, error, None if why_whole else part, why_whole)
            batches, taken_again = start_over(), True

    def _failed(self, phase: Phase, error: str | None) -> bool:
        """Whether something has to be run again."""
        if again := self._votes.finish_exchanges(phase, error):
            raise self._error(_when(phase, self._step), again, ", and again in what other processes need to go on")
        return self._votes.failed(phase, error)

    def _fall_back(self, phase: Phase, error: str | None, part: Any = None, why_whole: str | None = None) -> None:
        """Choose the next fallback where memory ran out, and use it from here on.

        Args:
            phase: what is being done.
            error: what was reported; where memory ran out on other ranks only, their choice is followed.
            part: the batch that failed, if it may be split.
            why_whole: why it may not.
        """
        is_own = error not in (None, ELSEWHERE)
        own = [(*self._choose(phase, part), str(error))] if is_own else []
        for name, value, text in self._votes.choices(phase, own):
            words = self._change(phase, name, value)
            if self._votes.is_last(phase, words is None) or words is None:
                if not is_own:
                    self._votes.wait()
                whole = f" (micro-batches are not split: {why_whole})" if why_whole else ""
                place = " in forward or backward," if phase == "training" else ","
                raise self._error(_when(phase, self._step), text, f"{place} and no fallback is left{whole}")
            setting = {name: bool(value) if name == "offload_activations" else value}
            self._use(setting)
            self._tried.append(words)
            self._notify(Change(self._step, phase, text, words, setting))

    def _choose(self, phase: Phase, part: Any) -> tuple[str, int]:
        """The next fallback's setting."""
        if phase == "training" and self.kept_layers:  # which costs least, and leaves batches as they are
            return "kept_layers", 0
        if halves := halve(part) if part is not None else []:
            return _LIMITS[phase][0], max(size(half) for half in halves)
        if phase == "training" and not self.offload_activations and has_separate_host(self.device):
            return "offload_activations", 1
        return "demoted", 1

    def _change(self, phase: Phase, name: str, value: int) -> str | None:
        """What a setting changes, in words; None where nothing is left to change. Experts are moved here."""
        if name == "demoted":
            return self._offload_more(phase)
        if name == "kept_layers":
            kept = f"{self.kept_layers} did" if self.kept_layers > 1 else "one did"
            return f"no expert layer keeps gate and up for backward ({kept}), which computes them again"
        return (
            "activations are offloaded to the host"
            if name == "offload_activations"
            else _LIMITS[phase][1].format(value)
        )

    def _offload_more(self, phase: str) -> str | None:
        """Offload experts of some layers; what was moved in words, None where nothing is left to move."""
        placement = placement_of(self._model)
        moved, error = attempt(placement.offload_more) if placement else (None, None)
        if error is not None:
            raise self._error(_when(phase, self._step), error, ", and so did the place that experts were offloaded to")
        return moved

    def _use(self, setting: dict[str, Any]) -> None:
        """Put a setting in force; one that is stricter already stays."""
        for name, _ in _LIMITS.values():
            if name in setting:
                self.limits[name] = min(setting[name], self.limits.get(name, setting[name]))
        if "kept_layers" in setting:
            self._keep(setting["kept_layers"])
        if "offload_activations" in setting:
            self.offload_activations = has_separate_host(self.device)
        if "working_set_bytes" in setting:  # only in records of releases that lowered it
            settings = settings_of(self._model)
            held = settings.working_set_on(self.device.type)
            settings.working_set_bytes = min(setting["working_set_bytes"], held)

    def _repeat_earlier(self, and_after: bool) -> None:
        """Make the changes again that the interrupted run had made by this step, or after its update as well."""
        for change in list(self._earlier):
            if change.step < self._step or (change.step == self._step and (and_after or change.is_within_step)):
                self._earlier.remove(change)
                self._use(change.setting)
                if "demoted" in change.setting:
                    self._offload_more(change.during)
                if change.setting:
                    self._tried.append(change.change)

    def _error(self, when: str, error: str, why: str) -> DoesNotFitError:
        tried = f"Tried: {'; '.join(self._tried)}" if self._tried else "No fallback could be tried"
        head = f"{when} ran out of memory{why}: {error}. {tried}. The peak was {peak_memory_bytes() / 1e9:.2f} GB"
        if self.run_dir is None:
            return DoesNotFitError(f"{head}. Try again where there is more memory")
        return DoesNotFitError(
            f"{head}; {last_good_checkpoint(self.run_dir)}. Resume from it with {option('resume')} where there is "
            "more memory, or start a new run with training.gradient_checkpointing, or with a lower data.max_length or "
            "lora.r"
        )


def _nothing_of(batch: Batch) -> Batch:
    """A batch without tokens."""
    return {**batch, "input_ids": batch["input_ids"][:, :0]}


def _when(during: str, step: int) -> str:
    if during in ("training", "clipping", "optimizer"):
        return f"step {step}"
    after = f"after step {step}" if step else "before the first step"
    phase = {"generation": "generation", "preflight": "the preflight check"}.get(during, f"the {during}")
    return f"{phase} {after}"
