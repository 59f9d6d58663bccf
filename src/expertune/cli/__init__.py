"""The command line: thin commands over `expertune`, which a file for each kind of command has.

Results go to stdout, everything else to stderr. Exit code 0 is success, 2 an error that the user can fix, 130 Ctrl-C;
a traceback means a bug. torch and transformers are imported by the command that needs them, so that `--help`, a typing
mistake or a bad run file answers at once.
"""

import os
import sys
import warnings
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer

import expertune
from expertune.cli.examples import epilog
from expertune.cli.files import export, quantize, verify
from expertune.cli.finished import chat, evaluate, generate
from expertune.cli.pages import compare, doctor, report
from expertune.cli.training import data, init, plan, train
from expertune.errors import ExpertuneError
from expertune.kernels.threads import prepare_threads
from expertune.storage import failure
from expertune.terminal import log, log_error, note

_WIDEST_HELP = 120
"""Columns that help is at most laid out in; a narrower terminal folds it."""


class _Commands(typer.core.TyperGroup):
    """The commands, which turn an error that a user can fix into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        with warnings.catch_warnings():  # `_silence_libraries` is undone where a program runs a command in-process
            try:
                return super().invoke(ctx)
            except ExpertuneError as error:
                log_error(error)
                raise typer.Exit(2) from None
            except OSError as error:
                # A failed read or write is the user's to fix; a closed pipe is handled by `main`.
                if (reason := failure(error)) is None:
                    raise
                note(f"expertune: error: {reason}")
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                log("expertune: interrupted")
                raise typer.Exit(130) from None


app = typer.Typer(
    name="expertune",
    cls=_Commands,
    help="Fine-tune mixture-of-experts language models whose experts are frozen in 4 bits (QLoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut the names of options where a terminal is narrow
    context_settings={"max_content_width": _WIDEST_HELP},
)


def main() -> None:
    """The console script `expertune`.

    Raises:
        SystemExit: always, with the exit code.
    """
    prepare_threads()  # before the command imports torch
    if os.environ.get("COLUMNS", "").strip("0 ") == "":
        os.environ.pop("COLUMNS", None)  # a terminal that does not know its width: rich would print nothing
    try:
        try:
            app(prog_name="expertune")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would fail once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"expertune {expertune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _paragraphs(command: Callable[..., None]) -> list[str]:
    """A command's docstring in paragraphs of one line: the terminal breaks them where it ends."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return [paragraph.replace("\n", " ") for paragraph in paragraphs]


for _command in (init, plan, data, train, evaluate, generate, chat, quantize, export, verify, report, compare, doctor):
    _says = _paragraphs(_command)
    # The first paragraph is also what the list of commands has, which would otherwise cut it at one line.
    app.command(short_help=_says[0], help="\n\n".join(_says), epilog=epilog(_command.__name__))(_command)
