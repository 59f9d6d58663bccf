"""What runs out of memory is done again: a training step from its start, with the next cheaper setting.

`expertune.train.ladder` says which settings give way. What can be cut is done again in smaller batches: training steps,
evaluations, the proof's probe, generation. An optimizer's update and the clipping of gradients go on from the operator
that failed, a checkpoint is written anew. A resumed run changes at the same steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.placement.out_of_memory import in_one_line, is_out_of_memory
from expertune.train.cut import Batch, cut
from expertune.train.ladder import Change, Ladder, Moment
from expertune.train.out_of_memory import RandomState, RetriedOperators, give_back

_Result = TypeVar("_Result")


class Recovery(TrainerCallback):
    """Does again what ran out of memory. A callback, so that it knows when a step begins.

    Args:
        model, device, offload, earlier, tell: see `expertune.train.ladder.Ladder`; each of the earlier changes is made
            again at its step.

    Attributes:
        ladder: the settings that give way.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: bool = False,
        earlier: Sequence[dict[str, Any]] = (),
        tell: Callable[[Change], None] = lambda _: None,
    ) -> None:
        self.ladder = Ladder(model, device, offload, earlier, tell)
        self._guarded: Optimizer | None = None
        self._has_updated = False
        self._random = RandomState()
        self._batches: list[Batch] = []
        self._returned: Tensor | float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where the step begins."""
        self.ladder.run_dir = str(args.output_dir)
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

        def start_over() -> list[Batch]:
            again()
            self._random.restore()
            return self._batches

        losses, taken_again = self._until_it_fits("training", compute, [batch], start_over, whole)
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        added = total - self._returned if taken_again else total
        self._returned = self._returned + added
        return added

    def evaluation(self, compute: Callable[[Batch], _Result], batch: Batch, step: int) -> list[_Result]:
        """What `compute` returns for an evaluation batch, part by part.

        Args:
            compute: computes on a batch or a part of one, without gradients.
            batch: the batch.
            step: the optimizer step that was taken last; 0 before the first.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        return self._in_parts("evaluation", compute, batch, step)

    def generation(self, compute: Callable[[Sequence[Any]], _Result], rows: Sequence[Any], step: int) -> list[_Result]:
        """What `compute` returns for rows that are answered together, part by part; else as `evaluation`."""
        return self._in_parts("generation", compute, rows, step)

    def proof_batch(self, compute: Callable[[Batch], _Result], batch: Batch) -> tuple[_Result, dict[str, Any]]:
        """What `compute` returns for as much of the proof's batch as fits, and that much of it.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        self.ladder.repeat(0, and_after=True)

        def first() -> list[Batch]:
            part = cut(batch, self.ladder.limit("proof"))[0]
            return [{name: value for name, value in part.items() if isinstance(value, Tensor)}]

        tried: list[Batch] = []

        def keep(part: Batch) -> _Result:
            tried[:] = [part]
            return compute(part)

        results, _ = self._until_it_fits("proof", keep, first(), first)
        return results[0], dict(tried[0])

    def anew(self, during: Moment, do: Callable[[], _Result], undo: Callable[[], None] = lambda: None) -> _Result:
        """Do what can be done again as a whole, with nothing changed that would change its result.

        Args:
            during: what it is.
            do: does it.
            undo: undoes what a failed try has done.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        tries = 0
        while True:
            try:
                return do()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = in_one_line(error)
            undo()
            self._make_room(during, said, tries)
            tries += 1

    @contextmanager
    def operators(self, during: Moment) -> Iterator[None]:
        """Inside, each operator that runs out of memory is run again by itself: see `RetriedOperators`.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        failures = 0

        def make_room(error: str, tries: int) -> None:
            nonlocal failures
            # Operators leave no cycles: those that there were are gone after the first failure.
            self._make_room(during, error, tries, cycles=not failures)
            failures += 1

        with RetriedOperators(make_room):
            yield

    def guard(self, optimizer: Optimizer) -> None:
        """Let the optimizer's updates go through whole when memory runs out in them.

        An update goes on from the operator that failed. In the first one optimizers allocate their states, some not by
        torch's operators, and kernels are loaded; so the parameters are kept on the host meanwhile, and it can be taken
        again from its start as well. If memory runs out in a later one outside of an operator that can be run again,
        how far the update came is not known to anyone, and the run stops.
        """
        if self._guarded is optimizer:
            return
        self._guarded, step = optimizer, optimizer.step

        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._update(optimizer, partial(step, *args, **kwargs))

        # Bound: transformers' schedule wraps the method's function.
        optimizer.step = MethodType(guarded, optimizer)  # type: ignore[method-assign]

    @contextmanager
    def stops_clearly(self) -> Iterator[None]:
        """Memory that runs out anywhere else (collating rows, logging) ends the run with an error of its own.

        Raises:
            DoesNotFitError: names the last good checkpoint.
        """
        try:
            yield
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = in_one_line(error)
        raise self.ladder.stop(None, said, "outside of all that could be done again")

    def _begin_step(self, step: int) -> None:
        self.ladder.step = step
        self.ladder.repeat(step, and_after=False)
        self._batches, self._returned = [], 0.0
        self._random = RandomState()

    def _in_parts(self, during: Moment, compute: Callable[[Any], _Result], batch: Any, step: int) -> list[_Result]:
        self.ladder.step = step
        self.ladder.repeat(step, and_after=True)
        return self._until_it_fits(during, compute, [batch], lambda: [batch])[0]

    def _until_it_fits(
        self,
        during: Moment,
        compute: Callable[[Any], _Result],
        batches: Sequence[Any],
        start_over: Callable[[], Sequence[Any]],
        whole: str | None = None,
    ) -> tuple[list[_Result], bool]:
        """The results of all parts of all batches, and whether it took more than one try."""
        taken_again = False
        while True:
            results: list[_Result] = []
            part: Any = None
            try:
                for batch in batches:
                    for part in cut(batch, self.ladder.limit(during)):
                        results.append(compute(part))
                return results, taken_again
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = in_one_line(error)
            # Not inside the except block: there the error's traceback holds every tensor of the failed try.
            results.clear()
            give_back()
            self.ladder.descend(during, said, None if whole else part, whole)
            batches, taken_again = start_over(), True

    def _make_room(self, during: Moment, error: str, tries: int, cycles: bool = True) -> None:
        """After a failed try: give back what is unused, and from the second on move expert bytes away."""
        give_back(cycles)
        if tries:
            self.ladder.descend(during, error, to_the_byte=True)
        else:
            self.ladder.gave_back(during, error)

    def _update(self, optimizer: Optimizer, step: Callable[[], Any]) -> Any:
        def update() -> Any:
            with self.operators("optimizer"):
                return step()

        if optimizer.state or self._has_updated:
            try:
                return update()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = in_one_line(error)
            raise self.ladder.stop("optimizer", said, "and the adapter may be half updated: it is not saved")

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with self.operators("optimizer"):
            before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

        @torch.no_grad()
        def undo() -> None:
            for parameter, kept in zip(parameters, before, strict=True):
                parameter.copy_(kept)
            optimizer.state.clear()

        result = self.anew("optimizer", update, undo)
        self._has_updated = True
        return result
