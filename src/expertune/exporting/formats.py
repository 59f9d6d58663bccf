"""The formats of an export by name, and what each is to the walk that writes and verifies it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from expertune.exporting import FORMATS, require_known
from expertune.exporting.source import ExportSource
from expertune.text import counted

Progress = Callable[[str, int, int], None]
"""What is being written, bytes done, bytes in all."""


@dataclass(frozen=True)
class Engine:
    """How an export is run in an engine that reads it, beside the reference.

    Attributes:
        name: what it is called in messages and in `verification.json`.
        program: the script of `expertune.exporting.engines` that runs it, or a path.
        base: the case (keys of the script's own) that runs the base model alone; None where the export holds weights,
            and nothing in it is the base's.
        exported: the case that runs the export.
        rounded: by live name of a parameter that the adapter changes, the dtype of torch that the export rounds it to,
            for the reference to round as well; `*` is that of all weights that the run holds in 4 bits.
        reference: the base of the reference: the 16-bit weights, or the values that the run's 4-bit weights stand for.
        has_trained: whether the trained model itself, with its 4-bit weights, is to be shown beside it.
        measure: how differences of log-probabilities become one: their largest; or their mean, for an engine that
            rounds so much that some tokens are routed to other experts.
        floor: differences that the engine's own arithmetic may make, in nats.
        positions: at how many positions it answers, where that is dear; None means at all.
        missing: what to do to have the engine, where it is not installed.
        python: the interpreter that runs the script.
        verdict: how it is compared, where it does not compute log-probabilities.
    """

    name: str
    program: str
    base: dict[str, Any] | None
    exported: dict[str, Any]
    rounded: dict[str, str] | None = None
    reference: Literal["source", "dequantized"] = "source"
    has_trained: bool = False
    measure: Literal["max", "mean"] = "max"
    floor: float = 1e-4
    positions: int | None = None
    missing: str | None = None
    python: str | None = None
    verdict: "Callable[[ExportSource, Engine], Verdict] | None" = None


@dataclass(frozen=True)
class Options:
    """What a user may choose of a format.

    Attributes:
        base: weights of a merged model: `source`, or `dequantized`, the values that the adapter was trained beside.
        type: how numbers are held, e.g. `q8_0`, where the format has several ways; None means its own choice.
    """

    base: str = "source"
    type: str | None = None


class Format(Protocol):
    """One format; made with `Options`.

    Attributes:
        name: as `--to` names it.
        resumes: whether `write` continues what a killed one left in the folder; others get an empty folder.
        notes: what users of the export have to know, when `require` has been called.
        takes_dora: whether it can hold DoRA's magnitudes, or what they make of the weights.
    """

    name: str
    resumes: bool = False
    notes: Sequence[str] = ()
    takes_dora: bool = False

    def require(self, source: ExportSource) -> None:
        """Refuse, by name and before any work, what cannot be exported.

        Raises:
            ExportError: the family is not known to the engine, or the like; says what to do instead.
        """

    def nbytes(self, source: ExportSource) -> int:
        """Bytes that it will write."""

    def nbytes_to_verify(self, source: ExportSource) -> int:
        """Bytes that its engines need beside it for a while."""
        return 0

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the export into an empty folder that exists."""

    def engines(self, source: ExportSource, folder: Path, base: Path) -> Sequence[Engine]:
        """How it is verified.

        Args:
            source: what was exported.
            folder: where to.
            base: a 16-bit folder of the base model, as transformers reads it.
        """


@dataclass
class Verdict:
    """What came of one engine.

    Attributes:
        engine: its name, with versions where it ran.
        verdict: `verified`, `failed` or `not verified`.
        reason: of a verdict that is not `verified`; of one that is, what it leaves open.
        figures: tolerance and differences, in nats; prompts, positions, and how many experts these reached.
        disagreeing: of a failed one, the projections and layers whose tensors disagree.
    """

    engine: str
    verdict: str
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    disagreeing: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """For the terminal: what came of it, and where losses were compared, these."""
        between = "; " if self.verdict == "verified" else ": "
        found = [f"{self.engine}: {between.join(filter(None, (self.verdict, self.reason)))}"]
        loss = self.figures.get("loss", {})
        if loss.get("trained") is not None:
            found.append(
                f"loss on {counted(self.figures['examples'], 'example')}: {loss['trained']:.4f} with the adapter on "
                f"the 4-bit weights that it was trained beside, {loss['exported']:.4f} merged"
            )
        return found


def make_format(name: str, options: Options) -> Format:
    """The format of this name.

    Raises:
        ConfigError: there is none, or it has no such option.
    """
    require_known(name, options.base, options.type)
    module = import_module(f"expertune.exporting.{FORMATS[name]}")
    made: Format = module.make(name, options)
    return made
