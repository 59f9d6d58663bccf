"""What a run is about to train on, on the terminal: choices, columns, warnings, and examples with their trained part.

The marks are characters, so that they survive where there is no color: in a file, in a pipe, on a plain terminal.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertune.text import counted, printable, shortened

_NAMES = {"train": "training examples", "eval": "evaluation examples"}
_MARKS = (("⟦", "⟧"), ("«", "»"), ("[[", "]]"), ("<<<", ">>>"), ("[TRAINED>", "<TRAINED]"))
_PARTS_AT_AN_END = 6
_GUTTER, _CONTINUED = "  | ", "    "


def render_preview(part: str, preview: Mapping[str, Any], max_chars: int = 600) -> RenderableType:
    """One source of a run, before it is trained on.

    Args:
        part: `train` or `eval`.
        preview: what `expertune.data.preview.preview` returned, as plain values.
        max_chars: the middle of a longer piece of text is left out, and the number of characters is shown.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _facts(part, preview):
        style = "yellow" if label == "warning" else ""
        table.add_row(Text(f"  {label}", style=style), Text(printable(text), style=style))
    title = Text(printable(f"{_NAMES[part]}: {preview['source']}"), style="bold")
    return Group(title, table, *(_Example(example, max_chars) for example in preview["examples"]))


def counts_of(example: Mapping[str, Any]) -> str:
    """How long an example is, and how much of it is trained."""
    if "columns" in example:
        told = ", ".join(printable(name) for name in example["columns"]) or "no column"
        return f"{counted(example['num_tokens'], 'token')}, to which answers are written; rewards are told {told}"
    cut = example["uncut_length"] - example["num_tokens"]
    counts = f"{counted(example['num_tokens'], 'token')}, {example['num_trained']} trained"
    counts = f"{counts}, {cut} more cut off" if cut > 0 else counts
    if "label" in example:
        counts += ", a good answer" if example["label"] else ", a bad answer"
    return f"{counts}; rejected: {counts_of(example['rejected'])}" if "rejected" in example else counts


def _facts(part: str, preview: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    chosen, columns = preview["chosen"], preview["columns"]
    reason = "chosen for this layout" if part == "train" else "that of the training examples"
    yield "layout", preview["format"] + (", recognized by the columns" if chosen["format"] == "default" else "")
    yield "template", preview["template"] + (f", {reason}" if chosen["template"] == "default" else "")
    ignored = ", ".join(f"{name} (in {count})" for name, count in columns["ignored"].items()) or "none"
    yield "columns", f"used: {', '.join(columns['used'])}; ignored: {ignored}"
    counts = [f"{preview['num_rows']} used"]
    for key, words in (
        ("num_truncated", f"cut at {preview['max_length']} tokens"),
        ("num_skipped", "skipped as unusable"),
        ("num_flagged", "left out, flagged not to be trained"),
    ):
        if preview[key]:
            counts.append(f"{preview[key]} {words}")
    yield "examples", ", ".join(counts)
    if preview.get("kind") == "prompts":
        yield "tokens", f"{preview['num_tokens']:,} in prompts"
    else:
        yield "tokens", f"{preview['num_tokens']:,}, of which {preview['num_label_tokens']:,} are trained"
    if pairs := preview.get("pairs"):
        yield (
            "pairs",
            f"chosen is longer in {pairs['chosen_longer']} and rejected in {pairs['rejected_longer']} of "
            f"{preview['num_rows']}; {pairs['chosen_tokens']:.1f} and {pairs['rejected_tokens']:.1f} tokens on average",
        )
    if labels := preview.get("labels"):
        yield "labels", f"{counted(labels['desirable'], 'good answer')}, {counted(labels['undesirable'], 'bad one')}"
    for warning in preview["warnings"]:
        yield "warning", warning
    for hint in preview["hints"]:
        yield "hint", hint


class _Example:
    """An example's text in the width that there is; lines of the text start with a bar, wrapped ones do not."""

    def __init__(self, example: Mapping[str, Any], max_chars: int) -> None:
        self._example, self._max_chars = example, max_chars

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        example, other = self._example, self._example.get("rejected", {"parts": []})
        # The prompt is that of the chosen answer.
        rejected = _encodable_parts([part for part in other["parts"] if part["trained"]], options.encoding)
        parts = _encodable_parts(example["parts"], options.encoding)
        marks = start, end = _marks("".join(text for text, _ in (*parts, *rejected)), options.encoding)
        legend = "" if "columns" in example else f"; what is trained stands between {start} and {end}"
        heading = Text(f"{printable(example['place'])}: {counts_of(example)}{legend}")
        yield from _wrapped(heading, "  ", console, options)
        for line in self._body(parts, marks, "bold green").split("\n", allow_blank=True):
            yield from _wrapped(line, _GUTTER, console, options)
        for name, value in example.get("columns", {}).items():
            text = _encodable(printable(f"{name}: {value}"), options.encoding)
            yield from _wrapped(Text(shortened(text, self._max_chars)), "    ", console, options)
        if rejected:
            yield Text("  rejected:")
            for line in self._body(rejected, marks, "bold red").split("\n", allow_blank=True):
                yield from _wrapped(line, _GUTTER, console, options)

    def _body(self, parts: Sequence[tuple[str, bool]], marks: tuple[str, str], style: str) -> Text:
        (start, end), body, left_out = marks, Text(), len(parts) - 2 * _PARTS_AT_AN_END
        for number, (text, trained) in enumerate(parts):
            if left_out > 1 and _PARTS_AT_AN_END <= number < _PARTS_AT_AN_END + left_out:
                body.append(f"\n[... {left_out} more parts ...]\n" if number == _PARTS_AT_AN_END else "", style="dim")
                continue
            shown = shortened(text, self._max_chars)
            body.append(f"{start}{shown}{end}" if trained else shown, style=style if trained else "")
        return body


def _wrapped(line: Text, first: str, console: Console, options: ConsoleOptions) -> Iterator[Text]:
    """A line in the width that there is, behind a mark of its first piece."""
    wrapped = line.wrap(console, max(options.max_width - len(_CONTINUED), 10), overflow="fold", no_wrap=False)
    for number, piece in enumerate(wrapped or [Text()]):
        yield Text.assemble((_CONTINUED if number else first, "dim" if first == _GUTTER else ""), piece)


def _encodable_parts(parts: Sequence[Mapping[str, Any]], encoding: str) -> list[tuple[str, bool]]:
    return [(_encodable(printable(part["text"]), encoding), part["trained"]) for part in parts]


def _marks(text: str, encoding: str) -> tuple[str, str]:
    """The first pair of marks that the text does not hold and the terminal can show."""
    for start, end in _MARKS:
        if start not in text and end not in text and _encodable(start + end, encoding) == start + end:
            return start, end
    return _MARKS[-1]


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)
