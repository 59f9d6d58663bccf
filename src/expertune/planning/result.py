"""A run's plan: what it needs, and whether it is there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import RenderableType

from expertune.errors import DoesNotFitError
from expertune.notebook.html import as_html
from expertune.placement import Location
from expertune.planning import table
from expertune.planning.disk import Disk
from expertune.planning.duration import Lengths, Pace, RunTime
from expertune.planning.fit import Advice, Change, as_yaml
from expertune.planning.inventory import FrozenWeights, Parameters
from expertune.planning.kept import KeptLayers
from expertune.planning.memory import Memory
from expertune.planning.micro_batch import MicroBatch
from expertune.planning.placement import PlannedPlacement
from expertune.planning.ranks import RanksPlan
from expertune.planning.speed import StepTime
from expertune.text import format_size


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run needs, and whether it is there.

    Attributes:
        model: folder or hub id, as in the run file.
        architecture: class of the transformers model.
        device: `cpu` or `cuda`.
        compute_dtype: dtype of tokens and of weights that are not in 4 bits, e.g. `bfloat16`.
        products_in: what 4-bit weights are multiplied in: that dtype, or what the device has in its place.
        parameters: numbers of parameters.
        weights: exact bytes of the base model as it is held.
        micro_batch: how the examples of a step run.
        memory: peak memory by component and phase, with these micro-batches and this placement.
        planned: where the experts of each layer are held, and why.
        budget_bytes: memory that the run may use.
        advice: what makes the run fit where it does not. No micro-batches are merged in its peaks.
        kept: expert layers that keep gate and up for backward.
        disk: sizes of files.
        time: how long a step takes; None where nothing is known of the device's speed.
        gpu: the GPU of the table that was planned for.
        notes: what the plan could not look at.
        ranks: of several ranks, what each holds and sends; all else is of the one that has the most. None for one.
        pace: how fast batches are; None where nothing is known of the device's speed.
        run_time: how long the whole run takes, see `timed`; None where nobody has counted the examples.
        objective: the run's.
        passes: what it computes beside a forward and a backward for each example, in words; empty for `sft`.
    """

    model: str
    architecture: str
    device: str
    compute_dtype: str
    products_in: str
    parameters: Parameters
    weights: FrozenWeights
    micro_batch: MicroBatch
    memory: Memory
    planned: PlannedPlacement
    budget_bytes: int
    advice: Advice
    kept: KeptLayers
    disk: Disk
    time: StepTime | None
    gpu: str | None
    notes: tuple[str, ...]
    ranks: RanksPlan | None = None
    pace: Pace | None = None
    run_time: RunTime | None = None
    objective: str = "sft"
    passes: str = ""

    def timed(self, lengths: Lengths) -> "Plan":
        """The plan with the time of the whole run.

        Args:
            lengths: how many examples there are, and how long.
        """
        notes = self.notes
        if lengths.unread:
            notes = (*notes, f"each example counts as data.max_length, and a run would stop at this: {lengths.unread}")
        return replace(self, run_time=self.pace.run_time(lengths) if self.pace else None, notes=notes)

    @property
    def what_to_change(self) -> tuple[Change, ...]:
        """The cheapest changes that make the run fit; all that lower the peak where none do; empty where it fits."""
        return self.advice.changes

    @property
    def placement(self) -> Mapping[str, Location]:
        """Where each experts module's bytes are held, by dotted name."""
        return self.planned.locations

    @property
    def changed_settings(self) -> dict[str, Any]:
        """All changes as dotted keys of the run file, of a key that is changed twice the last; empty where it fits."""
        return {key: value for change in self.what_to_change for key, value in change.settings.items()}

    @property
    def yaml(self) -> str:
        """All changes as lines of a run file."""
        return as_yaml(self.changed_settings)

    @property
    def smallest_peak_bytes(self) -> int:
        """The peak with all changes made."""
        return self.what_to_change[-1].peak_bytes if self.what_to_change else self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget."""
        return self.memory.peak_bytes <= self.budget_bytes

    def require_fit(self) -> "Plan":
        """Return the plan if the run fits.

        Raises:
            DoesNotFitError: it does not; the message shows the plan and what to change.
        """
        if not self.fits:
            raise DoesNotFitError(f"{self.model} does not fit: {table.shortfall(self)}\n\n{table.as_text(self)}")
        return self

    def __repr__(self) -> str:
        peak, budget = format_size(self.memory.peak_bytes), format_size(self.budget_bytes)
        return f"Plan({self.model!r}, peak {peak} of {budget}, {'fits' if self.fits else 'does not fit'})"

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        return as_html(table.render(self))

    def render(self) -> RenderableType:
        """The plan for `rich.console.Console.print`."""
        return table.render(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; sizes are in bytes, and keys that hold one end in `_bytes`."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "products_in": self.products_in,
            "parameters": {**asdict(self.parameters), "line": self.parameters.line},
            "weights": {"frozen_bytes": self.weights.frozen_bytes, **asdict(self.weights)},
            "micro_batch": asdict(self.micro_batch),
            "memory": {
                "peak_bytes": self.memory.peak_bytes,
                "moment": self.memory.phase,
                "components": dict(self.memory.components),
                "moments": self.memory.totals,
                "host_bytes": self.memory.host_bytes,
            },
            "placement": {
                "layers": self.planned.counts,
                "reason": self.planned.reason,
                "slot_bytes": self.memory.components["slots"],
                "modules": dict(self.placement),
            },
            "kept": asdict(self.kept),
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "what_to_change": [
                {"lines": change.lines, "yaml": change.yaml, **asdict(change)} for change in self.what_to_change
            ],
            "alternatives": [
                {"lines": change.lines, "yaml": change.yaml, **asdict(change)} for change in self.advice.alternatives
            ],
            "yaml": self.yaml,
            "smallest_peak_bytes": self.smallest_peak_bytes,
            "disk": asdict(self.disk),
            "time": self.time.to_json() if self.time else None,
            "run": self.run_time.to_json() if self.run_time else None,
            "gpu": self.gpu,
            "notes": list(self.notes),
            "ranks": self.ranks.to_json() if self.ranks else None,
            **({"objective": self.objective, "passes": self.passes} if self.passes else {}),
        }
