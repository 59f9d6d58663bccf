"""A step that runs out of memory is taken again from its start, with the next cheaper setting.

The ladder, cheapest first, each rung only where it can make room:

1. Smaller micro-batches, the same rows a step. All that grows with tokens shrinks, what is between an expert layer's
   products included, and nothing but time is lost.
2. What forward keeps for backward waits in host memory: one copy of a layer's input and output each way.
3. Half the working set of the expert layers. It bounds one layer's products only, which smaller micro-batches have made
   smaller already, and each further chunk of tokens decodes all of the layer's experts again.
4. Frozen expert bytes wait elsewhere, and are brought for each layer on each way through the model.

What was changed stays so for the rest of the run, and a resumed run changes at the same steps.
"""

import errno
import gc
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MethodType
from typing import Any, Literal, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.errors import DoesNotFitError
from expertune.kernels import routes, workspace
from expertune.placement.experts import demote
from expertune.train.callbacks import peak_memory_bytes
from expertune.train.checkpoints import last_good_checkpoint
from expertune.train.cut import Batch, cut, halve, num_tokens
from expertune.train.offload import has_host_apart

# Below this an expert layer decodes more than it multiplies.
LEAST_WORKING_SET_BYTES = 2**26

Moment = Literal["training", "evaluation", "optimizer"]

# What allocators say in a plain RuntimeError.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|std::bad_alloc|ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)
_LONGEST_ERROR = 300

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Change:
    """What was changed when memory ran out.

    Attributes:
        step: the optimizer step that was being taken, or had just been taken before an evaluation; from 1.
        during: where memory ran out.
        error: what the allocator said.
        change: what is otherwise from then on, in words.
        setting: the same by name: `micro_batch_tokens`, `evaluation_tokens`, `offload_activations`,
            `working_set_bytes` or `demoted`.
    """

    step: int
    during: Moment
    error: str
    change: str
    setting: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return asdict(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a CUDA device, of torch's CPU allocator, of Python or of the OS."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def give_back() -> None:
    """Free what a failed try has left: cycles, this thread's working memory, blocks that the CUDA allocator keeps."""
    gc.collect()
    workspace.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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


class Recovery(TrainerCallback):
    """Takes steps and evaluations again that ran out of memory. A callback, so that it knows when a step begins.

    Args:
        model: the adapted model.
        device: where it computes.
        offload: whether activations wait in host memory from the start.
        earlier: changes that the run made before it was interrupted, as `Change.to_json` gave them; each is made again
            at its step.
        tell: is told of each change.

    Attributes:
        micro_batch_tokens: most tokens of a micro-batch that has more than one row; None leaves it as it comes.
        evaluation_tokens: the same of an evaluation batch.
        offload: whether activations wait in host memory.
        tried: the changes so far, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: bool = False,
        earlier: Sequence[dict[str, Any]] = (),
        tell: Callable[[Change], None] = lambda _: None,
    ) -> None:
        self.model, self.device, self.tell = model, device, tell
        self.offload = offload and has_host_apart(device)
        self.micro_batch_tokens: int | None = None
        self.evaluation_tokens: int | None = None
        self.tried: list[str] = []
        self._earlier = sorted((Change(**change) for change in earlier), key=lambda change: change.step)
        self._run_dir, self._alone = "", True
        self._guarded: Optimizer | None = None
        self._has_updated = False
        self._step, self._random = 1, RandomState()
        self._batches: list[Batch] = []
        self._returned: Tensor | float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where the step begins."""
        self._run_dir, self._alone = str(args.output_dir), args.world_size == 1
        self._begin_step(state.global_step + 1)

    def micro_batch(
        self, compute: Callable[[Batch], Tensor], batch: Batch, again: Callable[[], None], whole: str | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, or of the whole step so far if memory runs out.

        Args:
            compute: forward and backward of a micro-batch or a part of one; returns its share of the step's loss.
            batch: the micro-batch.
            again: undoes what the step has done so far: gradients and counts.
            whole: why micro-batches cannot be cut; None where they can.

        Returns:
            What this micro-batch adds to the sum of the losses that were returned in this step.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        self._batches.append(batch)
        batches = [batch]

        def start_over() -> list[Batch]:
            again()
            self._random.restore()
            return self._batches

        losses, taken_again = self._until_it_fits("training", compute, batches, start_over, whole)
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        added = total - self._returned if taken_again else total
        self._returned = self._returned + added
        return added

    def evaluation(self, compute: Callable[[Batch], _Result], batch: Batch, step: int) -> list[_Result]:
        """What `compute` returns for an evaluation batch, part by part.

        Args:
            compute: computes on a batch or a part of one, without gradients.
            batch: the batch.
            step: the optimizer step that was taken last.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        self._step = max(step, 1)
        self._repeat(lambda change: change.step <= step)
        return self._until_it_fits("evaluation", compute, [batch], lambda: [batch])[0]

    def guard(self, optimizer: Optimizer) -> None:
        """Make the optimizer's first step one that is taken or not taken, also if memory runs out.

        It allocates its states then, parameter by parameter, some optimizers between updates; so the parameters are
        kept on the host meanwhile. Later steps allocate nothing that lasts. If memory runs out in one of these, how far
        the update came is not known to anyone, and the run stops.
        """
        if self._guarded is optimizer:
            return
        self._guarded, step = optimizer, optimizer.step

        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._take_optimizer_step(optimizer, partial(step, *args, **kwargs))

        # Bound: transformers' schedule wraps the method's function.
        optimizer.step = MethodType(guarded, optimizer)  # type: ignore[method-assign]

    @contextmanager
    def stops_clearly(self) -> Iterator[None]:
        """Memory that runs out anywhere else (gradient norms, a checkpoint) ends the run with an error of its own.

        Raises:
            DoesNotFitError: names the last good checkpoint.
        """
        try:
            yield
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = _say(error)
        raise self.stop(said, "outside of forward, backward and update")

    def stop(self, error: str, where: str) -> DoesNotFitError:
        """The error that ends a run."""
        tried = f"Tried: {'; '.join(self.tried)}" if self.tried else "Nothing cheaper could be tried"
        return DoesNotFitError(
            f"step {self._step} ran out of memory {where}: {error}. {tried}. The peak was "
            f"{peak_memory_bytes() / 1e9:.2f} GB; {last_good_checkpoint(self._run_dir)}. Go on from it with --resume "
            "where there is more memory, or start a new run with training.gradient_checkpointing, or with a lower "
            "data.max_length or lora.r"
        )

    def _begin_step(self, step: int) -> None:
        self._step = step
        self._repeat(lambda change: change.step < step or (change.step == step and change.during != "evaluation"))
        self._batches, self._returned = [], 0.0
        self._random = RandomState()

    def _until_it_fits(
        self,
        during: Moment,
        compute: Callable[[Batch], _Result],
        batches: Sequence[Batch],
        start_over: Callable[[], Sequence[Batch]],
        whole: str | None = None,
    ) -> tuple[list[_Result], bool]:
        """The results of all parts of all batches, and whether it took more than one try."""
        taken_again = False
        while True:
            results: list[_Result] = []
            part: Batch | None = None
            try:
                for batch in batches:
                    for part in cut(batch, getattr(self, _LIMIT[during])):
                        results.append(compute(part))
                return results, taken_again
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = _say(error)
            # Not inside the except block: there the error's traceback holds every tensor of the failed try.
            results.clear()
            give_back()
            if not self._alone:
                raise self.stop(said, "on one of several processes, which have to take the same steps")
            self._descend(during, said, None if whole else part, whole)
            batches, taken_again = start_over(), True

    def _descend(self, during: Moment, error: str, part: Batch | None, whole: str | None = None) -> None:
        """Change what is cheapest to change."""
        found = self._next_change(during, part)
        if found is None:
            reason = f" (micro-batches stay whole: {whole})" if whole else ""
            raise self.stop(error, f"in {_WORDS[during]}, and there is nothing cheaper left{reason}")
        sentence, setting = found
        self._make(setting)
        self.tried.append(sentence)
        self.tell(Change(self._step, during, error, sentence, setting))

    def _next_change(self, during: Moment, part: Batch | None) -> tuple[str, dict[str, Any]] | None:
        halves = halve(part) if part is not None else []
        if halves:
            most = max(num_tokens(half) for half in halves)
            return f"{_BATCHES[during]} of at most {most} tokens, or a single row", {_LIMIT[during]: most}
        if during == "training" and not self.offload and has_host_apart(self.device):
            return "activations wait in host memory", {"offload_activations": True}
        half_bytes = routes.working_set_bytes(self.device.type) // 2
        if during != "optimizer" and half_bytes >= LEAST_WORKING_SET_BYTES:
            return f"kernels.working_set of {half_bytes // 2**20}MiB", {"working_set_bytes": half_bytes}
        sentence = self._demote()
        return (sentence, {"demoted": 1}) if sentence else None

    def _demote(self) -> str | None:
        """Move frozen bytes of some layers away; says what was moved, None where there is nothing."""
        try:
            return demote(self.model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = _say(error)
        raise self.stop(said, "where experts were to be moved to")

    def _make(self, setting: dict[str, Any]) -> None:
        """Put a setting in force; one that is stricter already stays."""
        for name in ("micro_batch_tokens", "evaluation_tokens"):
            if name in setting:
                setattr(self, name, min(setting[name], getattr(self, name) or setting[name]))
        if "offload_activations" in setting:
            self.offload = has_host_apart(self.device)
        if "working_set_bytes" in setting:
            held = routes.working_set_bytes(self.device.type)
            routes.configure(working_set_bytes=min(setting["working_set_bytes"], held))

    def _repeat(self, due: Callable[[Change], bool]) -> None:
        """Make those changes again that the run had made by now before it was interrupted."""
        for change in [change for change in self._earlier if due(change)]:
            self._earlier.remove(change)
            self._make(change.setting)
            if "demoted" in change.setting:
                self._demote()
            self.tried.append(change.change)

    def _take_optimizer_step(self, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        is_first = not optimizer.state and not self._has_updated
        before = [parameter.detach().to("cpu", copy=True) for parameter in parameters] if is_first else []
        freed = False
        while True:
            try:
                result = step()
                self._has_updated = True
                return result
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = _say(error)
            give_back()
            if not is_first or not self._alone:
                raise self.stop(said, "in the optimizer's update, and the adapter may be half updated: it is not saved")
            with torch.no_grad():
                for parameter, kept in zip(parameters, before, strict=True):
                    parameter.copy_(kept)
            optimizer.state.clear()
            if freed:
                self._descend("optimizer", said, None)
            else:
                self.tell(Change(self._step, "optimizer", said, "memory that nothing uses has been given back"))
            freed = True


_LIMIT: dict[Moment, str] = {"training": "micro_batch_tokens", "evaluation": "evaluation_tokens"}
_BATCHES: dict[Moment, str] = {"training": "micro-batches", "evaluation": "evaluation batches"}
_WORDS: dict[Moment, str] = {
    "training": "forward or backward",
    "evaluation": "the evaluation after it",
    "optimizer": "the optimizer's first update, which allocates its states",
}


def _say(error: BaseException) -> str:
    """An allocator's message on one line."""
    text = re.sub(r"^\[enforce fail at [^\]]*\]\s*\S* == \S*\.\s*", "", " ".join(str(error).split()))
    return text[:_LONGEST_ERROR].rstrip(". ") or type(error).__name__
