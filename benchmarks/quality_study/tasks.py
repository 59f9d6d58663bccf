"""The tasks of the quality study, each as the part of a run file that is its own.

All three are learned by the embedded model in less than half a minute of one core. ViGGO is no part of its training;
the passages are, but not as questions.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_study.models import EMBEDDED, book_texts
from expertune.storage import write_whole

VIGGO = EMBEDDED.parent / "viggo"


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        what: for the page.
        figure: the score, by its key in a record.
        data: the `data:` section.
        task: the `task:` section.
        learning_rate: of AdamW.
    """

    what: str
    figure: str
    data: dict[str, Any]
    task: dict[str, Any]
    learning_rate: float = 4e-3


def tasks(work: Path) -> dict[str, Task]:
    """All tasks by name; files that have to be made are written to `work`."""
    for part in ("train", "valid"):
        rows = _shuffled(VIGGO / f"viggo-{part}.csv")
        _write(work / f"meaning-{part}.jsonl", [{"prompt": row["ref"], "completion": row["mr"]} for row in rows])
        # What a sentence does: the word before the bracket of its meaning representation.
        acts = [row["mr"].split("(")[0].replace("_", " ") for row in rows]
        _write(
            work / f"act-{part}.jsonl",
            [{"prompt": row["ref"], "completion": act} for row, act in zip(rows, acts, strict=True)],
        )
    _write(work / "book.jsonl", _passages())
    short = {"metric": "exact-match", "max_new_tokens": 8, "batch_size": 128}
    return {
        "meaning": Task(
            "ViGGO sentence -> meaning representation",
            "slot_f1",
            {
                "train": f"{work}/meaning-train.jsonl[0:512]",
                "eval": f"{work}/meaning-valid.jsonl[0:96]",
                "template": "viggo",
            },
            {"metric": "slot-f1", "rows": 64, "max_new_tokens": 96, "batch_size": 64},
        ),
        "act": Task(
            "ViGGO sentence -> dialogue act, one of 9",
            "exact_match",
            {
                "train": f"{work}/act-train.jsonl[0:512]",
                "eval": f"{work}/act-valid.jsonl[0:192]",
                "template": "question-answer",
            },
            short,
        ),
        "book": Task(
            "passage -> the book that it is from, one of 4",
            "exact_match",
            {
                "train": f"{work}/book.jsonl[0:512]",
                "eval": f"{work}/book.jsonl[512:704]",
                "template": "question-answer",
            },
            short,
        ),
    }


def _shuffled(source: Path) -> list[dict[str, str]]:
    """The rows of a file of ViGGO, which is sorted by act, in an order that is always the same."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    return rows


def _passages() -> list[dict[str, str]]:
    """Short paragraphs of four books and the book that each is from, in an order that is always the same."""
    names = {"grimms": "Grimm", "alice": "Alice", "wizard": "Oz", "just": "Just So"}
    rows = [
        {"prompt": paragraph, "completion": names[book.split("-")[0]]}
        for book, text in book_texts()
        for paragraph in text.split("\n")
        if 60 < len(paragraph) < 160
    ]
    random.Random(0).shuffle(rows)
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
