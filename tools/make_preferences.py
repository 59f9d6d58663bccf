"""Make the embedded pairs of answers from the embedded ViGGO examples.

Usage: python tools/make_preferences.py [folder]

Each pair has the right meaning representation of a sentence as `chosen`, and one with a single mistake as `rejected`: a
wrong value, a wrong attribute, a slot that is missing, another function, or brackets that do not close. Which, is drawn
with a seed; the files are the same on each machine. Training pairs are of every sixth training example, and evaluation
pairs of every fourth validation example.
"""

from __future__ import annotations

import csv
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

VIGGO = Path(__file__).resolve().parents[1] / "src" / "expertune" / "assets" / "viggo"
SLOT = re.compile(r"(\w+)\[([^\]]*)\]")
PARTS = {"train": 6, "valid": 4}

Row = dict[str, str]
Mistake = Callable[[str, random.Random], str]


class Mistakes:
    """Mistakes that a meaning representation can have, with the values and names that the data knows.

    Args:
        known: meaning representations.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.values: dict[str, list[str]] = {}
        self.functions: list[str] = []
        for text in known:
            self.functions.append(text.partition("(")[0])
            for name, value in SLOT.findall(text):
                self.values.setdefault(name, []).append(value)
        self.values = {name: sorted(set(found)) for name, found in sorted(self.values.items())}
        self.functions = sorted(set(self.functions))
        self.kinds: list[Mistake] = [self.value, self.value, self.attribute, self.missing, self.function, self.brackets]

    def value(self, text: str, rng: random.Random) -> str:
        """Another value of the same attribute."""
        slot = rng.choice(list(SLOT.finditer(text)))
        members = set(slot[2].split(", "))  # in another order a list says the same
        others = [other for other in self.values[slot[1]] if set(other.split(", ")) != members]
        value = rng.choice(others or [slot[2]])
        return text[: slot.start(2)] + value + text[slot.end(2) :]

    def attribute(self, text: str, rng: random.Random) -> str:
        """A value under an attribute that it does not belong to."""
        slot = rng.choice(list(SLOT.finditer(text)))
        name = rng.choice([other for other in self.values if other != slot[1]])
        return text[: slot.start(1)] + name + text[slot.end(1) :]

    def missing(self, text: str, rng: random.Random) -> str:
        """A slot less, where there are several."""
        slots = [slot[0] for slot in SLOT.finditer(text)]
        if len(slots) < 2:
            return text
        slots.remove(rng.choice(slots))
        return f"{text.partition('(')[0]}({', '.join(slots)})"

    def function(self, text: str, rng: random.Random) -> str:
        """Another function."""
        name, bracket, rest = text.partition("(")
        return rng.choice([other for other in self.functions if other != name]) + bracket + rest

    def brackets(self, text: str, rng: random.Random) -> str:
        """A bracket that does not close, or closes twice."""
        at = rng.choice([index for index, char in enumerate(text) if char in "])"])
        return text[:at] + text[at + 1 :] if rng.random() < 0.5 else text[: at + 1] + text[at] + text[at + 1 :]


def pairs(rows: list[Row], mistakes: Mistakes, every: int) -> list[Row]:
    """A pair of each `every`-th row."""
    made = []
    for index in range(0, len(rows), every):
        chosen, rng = rows[index]["mr"], random.Random(index)
        rejected = chosen
        while rejected == chosen:
            rejected = rng.choice(mistakes.kinds)(chosen, rng)
        made.append({"ref": rows[index]["ref"], "chosen": chosen, "rejected": rejected})
    return made


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(folder: Path) -> None:
    """Write both files into a folder."""
    mistakes = Mistakes(row["mr"] for row in read(VIGGO / "viggo-train.csv"))
    for part, every in PARTS.items():
        made = pairs(read(VIGGO / f"viggo-{part}.csv"), mistakes, every)
        with (folder / f"viggo-pairs-{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, made[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else VIGGO)
