"""Answers on stdout: as text, as JSON, or the base model's beside the tuned one's."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from expertune.report.differences import differences
from expertune.terminal import note, on_terminal, print_table, stdout_for_results
from expertune.text import counted, printable, shortened

if TYPE_CHECKING:
    from expertune.run.answering import Answer

# From this width on answers stand side by side.
_TWO_COLUMNS = 100

# How much of a prompt is shown above its answers.
_MAX_PROMPT = 600


@dataclass(frozen=True)
class Form:
    """How answers are printed.

    Attributes:
        compare: the base model's answer and the tuned one's together.
        as_json: an object a line.
        with_prompts: each prompt above its answer.
    """

    compare: bool
    as_json: bool
    with_prompts: bool


def print_answers(answers: "Iterator[Answer]", form: Form, max_new_tokens: int) -> None:
    """Print answers as they come, and at last how many of them were cut.

    Args:
        answers: what `expertune.answers` returns; with `compare` where the form has it.
        form: how they are printed.
        max_new_tokens: the longest answer.
    """
    cut: Counter[str] = Counter()
    num_answers = 0
    for group in _grouped(answers, 2 if form.compare else 1):
        cut.update(each.finish_reason for each in group)
        num_answers += len(group)
        if form.as_json:
            print(json.dumps(_to_json(group), ensure_ascii=False, default=str), flush=True)
        elif form.compare:
            print_table(Compared(*group))
        elif form.with_prompts:
            quoted = "\n".join(f"> {line}" for line in _prompt_of(group[0]).splitlines())
            print(f"{quoted}\n{on_terminal(group[0].completion)}\n", flush=True)
        else:
            print(on_terminal(group[0].completion), flush=True)
    if form.as_json:
        return
    if number := cut["length"]:
        note(f"cut after {counted(max_new_tokens, 'token')}: {_of(number, num_answers)}; see --max-new-tokens")
    if number := cut["context"]:
        note(f"cut where the model's context ends: {_of(number, num_answers)}")


def _of(number: int, total: int) -> str:
    return f"{number} of {total} answers" if total > 1 else "the answer"


def _grouped(answers: "Iterator[Answer]", size: int) -> "Iterator[list[Answer]]":
    group = []
    while True:
        with stdout_for_results():
            each = next(answers, None)
        if each is None:
            return
        group.append(each)
        if len(group) == size:
            yield group
            group = []


def _to_json(group: "list[Answer]") -> dict[str, Any]:
    shared = {"prompt": group[0].prompt, "prompt_tokens": group[0].prompt_tokens}
    found = [
        {
            "completion": each.completion,
            "adapter": each.adapter,
            "tokens": each.tokens,
            "finish_reason": each.finish_reason,
            "seconds": round(each.seconds, 3),
        }
        for each in group
    ]
    return {**shared, **found[0]} if len(found) == 1 else {**shared, "base": found[0], "tuned": found[1]}


def _prompt_of(answer: "Answer") -> str:
    prompt = answer.prompt
    if not isinstance(prompt, str):
        columns = {
            name: text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
            for name, text in prompt.items()
        }
        prompt = "\n".join(f"{name}: {text}" for name, text in columns.items())
    return printable(shortened(prompt, _MAX_PROMPT))


class Compared:
    """The base model's answer to a prompt and the tuned one's: side by side where there is room, what differs marked.

    Marks are colors and lines on a terminal, `[-...-]` and `{+...+}` elsewhere.
    """

    def __init__(self, base: "Answer", tuned: "Answer") -> None:
        self._base, self._tuned = base, tuned

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        """The prompt, and both answers under their names."""
        ours, theirs = differences(self._base.completion, self._tuned.completion)
        styled = console.is_terminal
        base = _marked(ours, ("[-", "-]"), "red strike" if styled else "")
        tuned = _marked(theirs, ("{+", "+}"), "bold green" if styled else "")
        names = "base", f"tuned ({self._tuned.adapter})"
        if prompt := _prompt_of(self._tuned):
            yield Text("\n".join(f"> {line}" for line in prompt.splitlines()), style="bold")
        if self._base.completion == self._tuned.completion:
            yield Text("both answer the same:", style="dim")
            yield base
            yield _figures(self._tuned)
        elif options.max_width >= _TWO_COLUMNS:
            table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
            for name in names:
                table.add_column(name, ratio=1, overflow="fold")
            table.add_row(base, tuned)
            table.add_row(_figures(self._base), _figures(self._tuned))
            yield table
        else:
            for name, text, answer in ((names[0], base, self._base), (names[1], tuned, self._tuned)):
                yield Text(name, style="underline")
                yield text
                yield _figures(answer)
        yield Text()


def _marked(pieces: list[tuple[str, bool]], marks: tuple[str, str], style: str) -> Text:
    text = Text(overflow="fold")
    for piece, differs in pieces:
        shown = printable(piece)
        if differs and not style:
            shown = f"{marks[0]}{shown}{marks[1]}"
        text.append(shown, style if differs else "")
    return text if text.plain else Text("(no text)", style="dim")


def _figures(answer: "Answer") -> Text:
    ends = {"stop": "", "length": ", cut", "context": ", cut where the model's context ends"}
    return Text(f"{counted(answer.tokens, 'token')}, {answer.seconds:.1f} s{ends[answer.finish_reason]}", style="dim")
