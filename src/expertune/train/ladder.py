"""What is changed when memory runs out, the cheapest first, and how a resumed run changes the same.

Each rung only where it can make room:

1. Smaller batches, the same rows in all. What grows with tokens shrinks, what is between an expert layer's products
   included, and nothing but time is lost.
2. What forward keeps for backward waits in host memory: one copy of a layer's input and output each way.
3. Half the working set of the expert layers. It bounds one layer's products only, which smaller batches have made
   smaller already, and each further chunk of tokens decodes all of the layer's experts again.
4. Frozen expert bytes wait elsewhere, and are brought for each layer on each way through the model.

What was changed stays so for the rest of the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from expertune.errors import DoesNotFitError
from expertune.kernels import routes
from expertune.placement.experts import offload_more
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory
from expertune.train.callbacks import peak_memory_bytes
from expertune.train.checkpoints import last_good_checkpoint
from expertune.train.cut import halve, size
from expertune.train.offload import has_separate_host

# Below this an expert layer decodes more than it multiplies.
LEAST_WORKING_SET_BYTES = 2**26

GIVEN_BACK = "memory that nothing uses has been given back"

Moment = Literal["proof", "training", "clipping", "optimizer", "evaluation", "checkpoint", "generation"]


@dataclass(frozen=True)
class Change:
    """What was changed when memory ran out.

    Attributes:
        step: the optimizer step that was being taken, or had been taken last; 0 before the first.
        during: where memory ran out.
        error: what the allocator said.
        change: what is otherwise from then on, in words.
        setting: the same by name: `micro_batch_tokens`, `evaluation_tokens`, `proof_tokens`, `generation_rows`,
            `offload_activations`, `working_set_bytes` or `demoted`; empty where giving memory back was enough.
    """

    step: int
    during: Moment
    error: str
    change: str
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For the terminal."""
        now = self.change if self.change == GIVEN_BACK else f"from here on {self.change}"
        return f"{_when(self.during, self.step)} ran out of memory ({self.error}); {now}"

    @property
    def is_within_step(self) -> bool:
        """Whether it was made before the step's update, not after it."""
        return self.during in ("training", "clipping", "optimizer")

    def to_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return asdict(self)


class Ladder:
    """The settings that give way.

    Args:
        model: the model, adapted or not.
        device: where it computes.
        offload: whether activations wait in host memory from the start.
        earlier: changes that the run made before it was interrupted, as `Change.to_json` gave them.
        tell: is told of each change.

    Attributes:
        step: the optimizer step that is being taken, or was taken last; 0 before the first.
        run_dir: the folder with the run's checkpoints; None outside of a run.
        most: the largest batch that is computed at once, by the name of its setting; one of a single row may be larger.
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
        self.model, self.device, self._tell = model, device, tell
        self.step = 0
        self.run_dir: str | None = None
        self.most: dict[str, int] = {}
        self.offload = offload and has_separate_host(device)
        self.tried: list[str] = []
        self._last_given_back: tuple[int, Moment] | None = None
        self._earlier = sorted((Change(**change) for change in earlier), key=lambda change: change.step)

    def limit(self, during: Moment) -> int | None:
        """The largest batch of such a moment; None where it is taken as it comes."""
        return self.most.get(_LIMIT.get(during, ""))

    def descend(
        self, during: Moment, error: str, part: Any = None, whole: str | None = None, to_the_byte: bool = False
    ) -> None:
        """Change what is cheapest to change.

        Args:
            during: where memory ran out.
            error: what the allocator said.
            part: the batch that did not fit; None where smaller ones would not help.
            whole: why batches cannot be cut, for the message.
            to_the_byte: only what leaves every result the same to the byte.

        Raises:
            DoesNotFitError: nothing is left that could make room.
        """
        found = self._next_change(during, part, to_the_byte)
        if found is None:
            reason = f" (micro-batches stay whole: {whole})" if whole else ""
            raise self.stop(during, error, f"and there is nothing cheaper left{reason}{_LEFT.get(during, '')}")
        sentence, setting = found
        self._make(setting)
        self.tried.append(sentence)
        self._tell(Change(self.step, during, error, sentence, setting))

    def gave_back(self, during: Moment, error: str) -> None:
        """Tell, once in a step, that nothing was changed but that unused memory was given back."""
        if self._last_given_back != (self.step, during):
            self._last_given_back = (self.step, during)
            self._tell(Change(self.step, during, error, GIVEN_BACK))

    def repeat(self, step: int, and_after: bool) -> None:
        """Make those changes again that the run had made before it was interrupted.

        Args:
            step: up to which step.
            and_after: those as well that were made after that step's update.
        """
        due = [
            change
            for change in self._earlier
            if change.step < step or (change.step == step and (and_after or change.is_within_step))
        ]
        for change in due:
            self._earlier.remove(change)
            self._make(change.setting)
            if "demoted" in change.setting:
                self._demote(change.during)
            if change.setting:
                self.tried.append(change.change)

    def stop(self, during: Moment | None, error: str, why: str) -> DoesNotFitError:
        """The error that ends a run: where memory ran out, and why nothing could be done."""
        where = f"step {self.step}" if during is None else _when(during, self.step)
        place = f" in {_PLACE[during]}," if during in _PLACE else "," if during else ""
        tried = f"Tried: {'; '.join(self.tried)}" if self.tried else "Nothing cheaper could be tried"
        head = (
            f"{where} ran out of memory{place} {why}: {error}. {tried}. The peak was {peak_memory_bytes() / 1e9:.2f} GB"
        )
        if self.run_dir is None:
            return DoesNotFitError(f"{head}. Try again where there is more memory")
        return DoesNotFitError(
            f"{head}; {last_good_checkpoint(self.run_dir)}. Go on from it with --resume where there is more memory, or "
            "start a new run with training.gradient_checkpointing, or with a lower data.max_length or lora.r"
        )

    def _next_change(self, during: Moment, part: Any, to_the_byte: bool) -> tuple[str, dict[str, Any]] | None:
        halves = halve(part) if part is not None else []
        if halves:
            most = max(size(half) for half in halves)
            return _SMALLER[during].format(most), {_LIMIT[during]: most}
        if during == "training" and not self.offload and has_separate_host(self.device):
            return "activations wait in host memory", {"offload_activations": True}
        half_bytes = routes.working_set_bytes(self.device.type) // 2
        if not to_the_byte and half_bytes >= LEAST_WORKING_SET_BYTES:
            return f"kernels.working_set of {half_bytes // 2**20}MiB", {"working_set_bytes": half_bytes}
        sentence = self._demote(during)
        return (sentence, {"demoted": 1}) if sentence else None

    def _demote(self, during: Moment) -> str | None:
        """Move frozen bytes of some layers away; says what was moved, None where there is nothing."""
        try:
            return offload_more(self.model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = in_one_line(error)
        raise self.stop(during, said, "and so did the place where experts were to be moved to")

    def _make(self, setting: dict[str, Any]) -> None:
        """Put a setting in force; one that is stricter already stays."""
        for name in _LIMIT.values():
            if name in setting:
                self.most[name] = min(setting[name], self.most.get(name, setting[name]))
        if "offload_activations" in setting:
            self.offload = has_separate_host(self.device)
        if "working_set_bytes" in setting:
            held = routes.working_set_bytes(self.device.type)
            routes.configure(working_set_bytes=min(setting["working_set_bytes"], held))


def _when(during: Moment, step: int) -> str:
    if during in ("training", "clipping", "optimizer"):
        return f"step {step}"
    after = f"after step {step}" if step else "before the first step"
    return f"{during if during == 'generation' else f'the {during}'} {after}"


# Moments that compute on batches, and the setting that bounds these.
_LIMIT: dict[Moment, str] = {
    "training": "micro_batch_tokens",
    "evaluation": "evaluation_tokens",
    "proof": "proof_tokens",
    "generation": "generation_rows",
}
_SMALLER: dict[Moment, str] = {
    "training": "micro-batches of at most {} tokens, or a single row",
    "evaluation": "evaluation batches of at most {} tokens, or a single row",
    "proof": "a proof on at most {} tokens, or a single row",
    "generation": "at most {} rows generated at once",
}
_PLACE: dict[Moment, str] = {
    "training": "forward or backward",
    "clipping": "the clipping of gradients",
    "optimizer": "the optimizer's update",
}
_LEFT: dict[Moment, str] = {
    "clipping": "; the step was not taken",
    "optimizer": "; the adapter is half updated, and is not saved",
}
