"""A conversation on the terminal: lines are questions or commands, and answers are streamed."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from expertune.errors import ConfigError, DataError, did_you_mean
from expertune.terminal import log, note, on_terminal

if TYPE_CHECKING:
    from expertune.generation.chat import Conversation

COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget earlier turns",
    "/system TEXT": "set the system prompt; without TEXT, remove it",
    "/base": "answer without the adapter, and with it again",
    "/exit": "end, as Ctrl-D does",
}
_HELP = "\n".join(f"  {name:14}{what}" for name, what in COMMANDS.items())

# A path is no command.
_COMMAND = re.compile(r"(/\w+)(?:\s+(.*))?$", re.DOTALL)


def converse(conversation: "Conversation") -> None:
    """Read lines and stream the answers, until /exit or the end of stdin."""
    for line in _lines():
        if match := _COMMAND.match(line):
            name, text = match.group(1), (match.group(2) or "").strip()
            if name == "/exit":
                return
            note(_obey(conversation, name, text))
        else:
            _answer(conversation, line)


def how_it_goes(conversation: "Conversation") -> str:
    """What a user has to know of the run's template before the first question."""
    if conversation.remembers:
        return "Earlier turns are part of each question; /reset forgets them."
    return (
        f"Template {conversation.questions.template.name} has no place for earlier turns: each line is asked by itself."
    )


def _answer(conversation: "Conversation", message: str) -> None:
    begun = False
    try:
        with contextlib.closing(conversation.stream(message)) as pieces:
            for piece in pieces:
                shown = piece if begun else piece.lstrip()
                begun = begun or bool(shown)
                print(on_terminal(shown), end="", flush=True)
    except KeyboardInterrupt as stopped:
        print(" ...", flush=True)
        # A second Ctrl-C, while the model is still at a token, is meant for the program.
        if type(stopped) is not KeyboardInterrupt:
            raise
        return
    except DataError as error:
        # One message that cannot be asked (one that is too long, for example) does not end the conversation.
        log(f"expertune: error: {error}")
        return
    print(flush=True)
    if conversation.finish_reason == "length":
        from expertune.text import counted

        note(f"(cut after {counted(conversation.sampling.max_new_tokens, 'token')}; see --max-new-tokens)")
    elif conversation.finish_reason == "context":
        note("(cut where the model's context ends; /reset makes room)")


def _obey(conversation: "Conversation", name: str, text: str) -> str:
    """Do what a command says; what to tell the user of it."""
    stay = "; earlier turns stay" if conversation.turns else ""
    if name == "/help":
        return f"{_HELP}\n  {'Ctrl-C':14}stop an answer"
    if name == "/reset":
        conversation.reset()
        return "Earlier turns are forgotten."
    if name == "/base":
        conversation.base_only = not conversation.base_only
        return f"From here on answers come with{'out' if conversation.base_only else ''} the adapter{stay}."
    if name == "/system":
        try:
            conversation.system = text or None
        except ConfigError as error:
            return f"expertune: error: {error}"
        return f"The system prompt is {'set' if text else 'gone'}{stay}."
    return f"{name} is no command{did_you_mean(name, [each.split()[0] for each in COMMANDS])}"


def _lines() -> Iterator[str]:
    """The user's lines up to the end of stdin, blank ones left out."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives `input` its line editing)
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise DataError("stdin: a line is not UTF-8; convert it, e.g. by iconv -f latin1 -t utf-8") from None
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            log("\n/exit or Ctrl-D ends.")
            continue
        if line:
            yield line
