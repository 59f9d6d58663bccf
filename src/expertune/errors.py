"""Every error that Expertune raises on purpose, as one tree.

The command line turns any `ExpertuneError` into exit code 2 and one message on stderr. Each message names what is
wrong, where (file, row, key or tensor), and how to fix it. Anything else that escapes is a bug.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class ExpertuneError(Exception):
    """Base of all errors below; catch this to catch everything that a user can fix.

    Attributes:
        rank: of several processes the one that says it; None in one process.
    """

    rank: int | None = None

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of the error: the message, without the way through this package."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(ExpertuneError):
    """The run file or an override is wrong: unknown key, bad value, missing file."""


class DataError(ExpertuneError):
    """The rows cannot be trained on as they are: names the file, the row and the fix."""


class CheckpointError(ExpertuneError):
    """A model or run checkpoint is missing, damaged, or holds other tensors than its config says."""


class UnsupportedModelError(ExpertuneError):
    """The model has no experts behind the contract of `use_experts_implementation`, or a shape we cannot pack."""


class DoesNotFitError(ExpertuneError):
    """More memory is needed than there is: by the plan, which the message shows with what to give up, or in mid-run."""


class PreflightError(ExpertuneError):
    """A check after attaching the adapter failed: not 4-bit, not learning, not repeatable, or not effective."""


ProofError = PreflightError
"""The older name of `PreflightError`, for code that catches it."""


class NonFiniteLossError(ExpertuneError):
    """The loss became NaN or infinite: names the step, the rows and the last good checkpoint."""


class NonFiniteGradientError(NonFiniteLossError):
    """A gradient or a weight became NaN or infinite under a finite loss; names the same, and the parameters."""


class RewardError(ExpertuneError):
    """A reward function raised, or returned what is no reward: names it, the row of the prompt and the fix."""


class ExportError(ExpertuneError):
    """An adapter or model could not be written in the layout asked for, or does not reload to the same logits."""


class StorageError(ExpertuneError):
    """A file of a run could not be read or written: names the file, the system's reason, and what to do."""


class RankError(ExpertuneError):
    """Another process of the run has failed or is gone."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like a misspelled one, for "did you mean"; None where none is like it."""
    return next(iter(difflib.get_close_matches(name[:80], list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """How a message about an unknown name ends: with the name that is meant, or with all that are known."""
    known = sorted(known)
    meant = nearest(name, known, cutoff)
    return f"; did you mean {meant}?" if meant else f"; known: {', '.join(known)}"


@contextlib.contextmanager
def naming(where: str, kind: type[ExpertuneError] = ExpertuneError) -> Iterator[None]:
    """Let errors of what is done inside begin with the key or the option that a value or a file was given as.

    Args:
        where: the key or the option.
        kind: which errors; others stay as they are.
    """
    try:
        yield
    except kind as error:
        error.args = (f"{where}: {error}",)
        raise


def option(name: str, value: str = "") -> str:
    """An option of a command as a message names it, which may be read by a user of Python."""
    given = f"--{name} {value}" if value else f"--{name}"
    return f"{given} ({name.replace('-', '_')}={value or True!r} in Python)"


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
