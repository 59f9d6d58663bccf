"""RunContext: what every step of a run is handed as one thing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from expertune.config import RunConfig
from expertune.distributed.mesh import Ranks
from expertune.distributed.sharded import Sharing
from expertune.evaluation.metrics import shown_figures
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.storage import notify_if_it_fails
from expertune.text import counted


@dataclass(frozen=True)
class RunContext:
    """Made once for a run, in `expertune.api`; made without training arguments where a finished run is opened.

    Attributes:
        config: the run file.
        record: what the run has done so far.
        device: where the model computes.
        bars: where progress is shown.
        ranks: which of the run's processes this is.
        sharing: the ranks that hold the experts together; None where each has all.
        resume: whether the run continues from its newest checkpoint.
        trust_remote_code: whether Python that ships with the model may run.
        trust_rewards: whether Python that the run file names as a reward may run.
        arguments: transformers' TrainingArguments, built once, after the plan has settled the micro-batch.
        notes: lines that the record keeps as `train.notes`.
    """

    config: RunConfig
    record: RunRecord
    device: torch.device
    bars: Bars
    ranks: Ranks = field(default_factory=Ranks)
    resume: bool = False
    trust_remote_code: bool = False
    trust_rewards: bool = False
    arguments: Any = None
    notes: list[str] = field(default_factory=list)
    sharing: Sharing | None = None

    @property
    def output_dir(self) -> Path:
        """The run directory, where the record lies."""
        return self.record.path.parent

    @property
    def console(self) -> Console:
        """Where the run's messages go."""
        return self.bars.console

    @property
    def seed(self) -> int:
        """The seed of the adapter's first values and of the training, with transformers' own default."""
        return int(self.config.training.get("seed", 42))

    def notify(self, line: str) -> None:
        """Show one line, in a file as one; a terminal folds it between words, so that a path in it can be copied."""
        self.bars.print(line)

    def tell(self, line: str) -> None:
        """Show one line, folded in a file too: of words, not of figures that are looked for there."""
        self.bars.print_folded(line)

    def show_score(self, when: str) -> None:
        """Show the record's score from `before` the training or `after` it."""
        score = self.record["task"][when]
        figures = ", ".join(f"{each.name} {score[each.name]:.3f}" for each in shown_figures(score))
        self.tell(f"{when}: {figures} on {counted(score['rows'], 'evaluation example')}")

    def write_beside(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of the run directory that the run can do without, on the rank that writes."""
        path = self.output_dir / name
        self.ranks.on_main(lambda: notify_if_it_fails(name, lambda: write(path), self.notify))

    def note(self, line: str) -> None:
        """Show a line and keep it in the record."""
        self.notes.append(line)
        self.notify(line)
        self.record.update("train", notes=self.notes)
