"""The last words of a run: what came out, on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHARES = {"slot_f1": "slot F1", "exact_match": "exact match"}


def render_summary(record: Mapping[str, Any], output_dir: str, examples: int = 3) -> RenderableType:
    """Figures of a finished run, a few answers, and what to do next.

    Args:
        record: the run record's values.
        output_dir: the run folder, for the commands.
        examples: how many answered evaluation rows are shown.
    """
    task = record.get("task", {})
    table = Table(title="what the run did", title_justify="left", box=None, pad_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, label in _SHARES.items():
        if key in task.get("after", {}):
            table.add_row(label, f"{task['before'][key]:.3f}", f"{task['after'][key]:.3f}")
    evaluation, train = record.get("eval", {}).get("loss", []), record.get("train", {}).get("loss", [])
    if len(evaluation) > 1:
        table.add_row("loss on held-out rows", f"{evaluation[0][1]:.3f}", f"{evaluation[-1][1]:.3f}")
    if train:
        table.add_row("training loss, first and last step", f"{train[0][1]:.3f}", f"{train[-1][1]:.3f}")
    table.add_row("tokens per second", "", f"{record['throughput']['tokens_per_second']:,.0f}")
    table.add_row("peak memory, GB", "", f"{record['memory']['peak_bytes'] / 1e9:.2f}")
    parts: list[RenderableType] = ["", table, ""]
    for example in task.get("after", {}).get("examples", [])[:examples]:
        parts.append(_example(example))
    parts.append(Text(f"adapter:  {output_dir}/adapter  (stock PEFT loads it)"))
    parts.append(Text(f"picture:  {output_dir}/summary.png"))
    parts.append(Text(f"try it:   expertune chat {output_dir}"))
    return Group(*parts)


def _example(example: Mapping[str, Any]) -> Text:
    mark = "right" if example["right"] else "wrong"
    return Text.assemble(
        (example["prompt"].strip(), "dim"),
        "\n  answered: ",
        (example["answered"].strip(), "green" if example["right"] else "yellow"),
        f"  ({mark})\n  expected: ",
        example["expected"].strip(),
        "\n",
    )
