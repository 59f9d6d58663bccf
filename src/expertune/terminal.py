"""What the command line reads and writes: results on stdout, everything else on stderr.

rich and the model's code are imported where they are used, so that a typing mistake answers at once.
"""

import atexit
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

# Width of a table that is not read on a terminal, and of a terminal that does not say its own.
_FILE_WIDTH, _UNKNOWN_WIDTH = 120, 80

_NUM_EXAMPLES = 8


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """While libraries run, what they print goes to stderr: stdout is what other programs read."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def log(message: str) -> None:
    """One message on stderr, as it is."""
    print(message, file=sys.stderr, flush=True)


def note(message: str) -> None:
    """A message on stderr, folded between words where the terminal ends."""
    log(_folded(message, sys.stderr))


def _folded(text: str, stream: Any) -> str:
    """A text as wide as COLUMNS says, or the terminal that reads it; for others as it is."""
    if width := _width(stream):
        from expertune.text import folded

        return folded(text, width)
    return text


def _width(stream: Any) -> int | None:
    """Columns that COLUMNS says, or of the terminal that reads a stream; None where neither is known."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _UNKNOWN_WIDTH
    except (OSError, ValueError):
        return _UNKNOWN_WIDTH


def on_terminal(text: str) -> str:
    """What a model wrote, for stdout; a terminal gets its control characters, which move the cursor, spelled out."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def log_error(error: BaseException, message: str | None = None) -> None:
    """An error, as `message` says it; of several processes one says it."""
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        from expertune.distributed.output import speaks

        if not speaks(error):
            return
    note(f"expertune: {message or f'error: {error}'}")


def print_json(value: Any) -> None:
    """JSON for other programs, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(renderable: Any) -> None:
    """Something that rich lays out, on stdout; in a file as wide as COLUMNS says, or as `_FILE_WIDTH`."""
    from rich.console import Console

    width = _width(sys.stdout) or _FILE_WIDTH
    Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False).print(renderable)


def print_scores(scores: dict[str, Any]) -> None:
    """What `expertune.evaluate` returns, as a table, and the first answered examples below it."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    task = scores.get("task", {})
    for name, value in [*scores.items(), *scores.get("figures", {}).items(), *task.items()]:
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif not isinstance(value, dict | list):
            table.add_row(name, str(value))
    print_table(table)
    for example in task.get("examples", [])[:_NUM_EXAMPLES]:
        verdict = "right" if example["right"] else "wrong"
        shown = f"\n{example['prompt']}\n  expected: {example['expected']}\n  {verdict}: {example['answered']}"
        print(on_terminal(_folded(shown, sys.stdout)))


def print_tasks(tasks: dict[str, Any]) -> None:
    """Scores of the harness's tasks by adapter, `none` for the base model, with their standard errors."""
    from rich.table import Table

    adapters = list(dict.fromkeys(which for scores in tasks.values() for which in scores))
    table = Table(box=None, pad_edge=False)
    for column in ("task", "figure", *("base" if which == "none" else which for which in adapters), "examples"):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right")
    for task, scores in tasks.items():
        first = next(iter(scores.values()))
        for name in first["figures"]:
            figures = [scores[which]["figures"][name] for which in adapters]
            table.add_row(task, name, *map(_with_error, figures), str(first["examples"]))
    print_table(table)


def _with_error(figure: dict[str, Any]) -> str:
    error = figure["stderr"]
    return f"{figure['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


@contextlib.contextmanager
def writing(command: str) -> Iterator[Callable[[str, int, int], None]]:
    """How far a command is that writes large files: (file, bytes done, bytes in all)."""
    from rich.console import Console

    from expertune.run.progress import BYTES, Bar, Bars

    bar = Bar(Bars(Console(stderr=True)), command, BYTES)
    try:
        bar.update(0, 0)
        yield lambda file, done, total: bar.update(done, total, what=file)
    finally:
        bar.close()


# Objects; a program that freezes what it has imported has tens of thousands, and Python itself has 375 in 3.12.
_FROZEN_BY_A_PROGRAM = 2000


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import libraries without looking for garbage, which modules are not.

    Python's collector goes over all that has been imported again and again while more comes, and once more in each
    full collection of a run. Here it waits, and afterwards it leaves out what has been imported until the process ends:
    then some libraries count what of theirs is left. What is frozen is never freed by the collector, so that this
    happens once in a process, not where an import failed, and not where the program around it has frozen already.
    Python 3.12 starts with some hundreds of frozen objects of its own.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if gc.get_freeze_count() < _FROZEN_BY_A_PROGRAM:
            gc.freeze()
            atexit.register(gc.unfreeze)
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say that a command is at work, and since when, where it takes long."""
    from rich.console import Console

    from expertune.run.progress import Bars

    with Bars(Console(stderr=True)).task(what):
        yield
