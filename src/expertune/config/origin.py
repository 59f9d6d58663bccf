"""Where the keys of a run file were read from, so that an error names the place that has to be mended."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """The file that a config was read from, and what was set above it; configs of the same keys are equal.

    Attributes:
        name: the file, or what stands for it.
        notes: a sentence for each value that was read under an earlier name.
        overrides: of each key that an override has set or made, in dots, that override as it was written.
    """

    name: str = field(default="config", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    overrides: Mapping[str, str] = field(default_factory=dict, compare=False)

    def of(self, key: str, message: str = "") -> str:
        """What an error names: the override that the value comes from, or the file.

        Args:
            key: the wrong key in dots; empty for what is wrong between several keys of the file.
            message: what is wrong, which may name other keys too; empty where all that is inside of it is wrong.
        """
        parts = key.split(".") if key else []
        for end in range(len(parts), 0, -1):
            if set_by := self.overrides.get(".".join(parts[:end])):
                return f"override {set_by!r}"
        named = [by for each, by in self.overrides.items() if _is_named(each, parts, message)]
        return f"{self.name} with {' '.join(dict.fromkeys(named))}" if named else self.name


def _is_named(key: str, wrong: list[str], message: str) -> bool:
    """Whether what is wrong at a key, given in its parts, comes from another key too."""
    if not message:
        return key.split(".")[: len(wrong)] == wrong
    section, _, inside = key.partition(".")
    names = [key, inside] if inside and wrong[:1] == [section] else [key]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", message) for name in names)
