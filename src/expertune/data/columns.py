"""What becomes of a file's columns: which are used, which are left out, and which must not be left out in silence.

A column that is not used is harmless where its text stands in the example anyway (`text` beside `instruction` and
`output`). Where it holds text of its own and a name that carries meaning, a layout that was only recognized is refused,
and one that the user has named is told with the number of examples.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from expertune.config import DataConfig
from expertune.data.column_template import Template
from expertune.data.formats import COLUMNS, WHOLE_CONVERSATIONS, Example, Layout
from expertune.errors import ConfigError, DataError, did_you_mean

# Names under which data sets hold what an example is made of.
_CONTENT = frozenset(
    {
        *("instruction", "instructions", "context", "input", "inputs", "question", "query", "prompt", "passage"),
        *("document", "documents", "choices", "options", "response", "output", "completion", "answer", "answers"),
        *("target", "summary", "solution", "translation", "chosen", "rejected", "messages", "conversations"),
    }
)
_RENDERED_PROMPTS = frozenset({"prompt", "query", "inputs"})
# What makes an example a message of a tree or of a table, and no text.
_TREE = frozenset(
    {
        *("role", "speaker", "sender", "parent_id", "message_id", "message_tree_id", "replies", "reply_to"),
        *("conversation_id", "dialogue_id", "dialog_id", "thread_id", "turn_id"),
    }
)
_LABELS = frozenset({"label", "labels"})
# Conventions that change what an example means and may be left out only if that is said.
_MEANINGFUL = frozenset(
    {
        *("system", "system_prompt", "system_message", "history", "tools", "functions", "weight", "weights"),
        *("reasoning", "reasoning_content", "thinking", "thoughts", "rationale", "chain_of_thought"),
        *("chat_template_kwargs", "images", "image", "videos", "audios", "audio"),
    }
)
_THOUGHTS = frozenset({"reasoning_content", "reasoning", "thinking", "thoughts"})


class ColumnUse:
    """Counts, over a source's examples, what is used of their columns.

    Args:
        data: the run's data section.
        layout: the layout of the examples.
        template: what renders them.
        own_template: whether the template is a file of the user's, who chose its columns.
        all_used: whether every column is used beside the template: rewards are told all of them.
    """

    def __init__(
        self, data: DataConfig, layout: Layout, template: Template, own_template: bool, all_used: bool = False
    ) -> None:
        self._data, self._layout, self._template, self._all_used = data, layout, template, all_used
        self._is_guess = data.format == "auto" and not data.columns and not own_template
        self._used: dict[str, None] = {}
        self._ignored: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._thoughts: Counter[str] = Counter()
        self._is_preference = False
        self._num_glued = 0
        self._num_examples = 0
        self._num_empty_prompts = 0
        self._first_empty_prompt = ""

    def add(self, raw: Mapping[str, Any], example: Example, text: str, place: str) -> None:
        """Count one example.

        Args:
            raw: the columns as the file names them.
            example: what the layout read.
            text: what the template made of it.
            place: how messages call the example.
        """
        self._num_examples += 1
        if example.has_empty_prompt:
            self._num_empty_prompts += 1
            self._first_empty_prompt = self._first_empty_prompt or place
        self._num_glued += self._is_glued(example)
        used = self._used_of(raw, example)
        parts = [part for part in self._parts(example) if part.strip()]
        for name, value in raw.items():
            if name in used:
                self._used[name] = None
            elif not _is_blank(value):
                self._ignored[name] += 1
                self._is_preference |= self._says_preference(name, value)
                if self._carries_meaning(name, value) and not _is_copy(name, value, text, parts):
                    self._lost[name] += 1
        for key in sorted({key for turn in example.messages or () for key in turn.extra} - self._template.names):
            self._ignored[f"{self._layout.answer}[].{key}"] += 1
            if key in _THOUGHTS:
                self._thoughts[key] += 1

    def require_fit(self, source: str) -> None:
        """Refuse a layout that was recognized by some columns and is contradicted by others.

        Args:
            source: how the error calls the source.

        Raises:
            DataError: names the columns, the number of examples, and the ways out.
        """
        if not self._is_guess:
            return
        stays = f"data.format: {self._layout.name}"
        if self._is_preference:
            raise DataError(
                f"{source}: a column (label or kto_tag) says of each answer whether it is a good one, and training "
                "would take all for good. Learn from both with objective: kto (data.columns: {label: ...}), keep the "
                f"good ones and drop the column, or set {stays} to train on them all"
            )
        lost = {name: count for name, count in self._lost.items() if name not in _MEANINGFUL}
        if lost:
            name, count = max(lost.items(), key=lambda item: item[1])
            fit = ", ".join(self._layout.needed)
            raise DataError(
                f"{source}: the columns {fit} look like the layout {self._layout.name}, but then "
                f"{', '.join(lost)} would not be used ({name} holds text of its own in {_of(count, self._num_examples)}"
                f" examples). Name the columns to use under data.columns, use them in a Jinja file of your own "
                f"(data.template), or set {stays} to leave them out"
            )

    def report(self) -> dict[str, Any]:
        """Plain values for the run record: `columns`, `num_empty_prompts` and `warnings`."""
        return {
            "columns": {
                "used": [_writable(name) for name in self._used],
                "ignored": {_writable(name): count for name, count in self._ignored.items()},
            },
            "num_empty_prompts": self._num_empty_prompts,
            "warnings": [_writable(line) for line in self._warnings()],
        }

    def _warnings(self) -> Iterator[str]:
        name, total = self._template.name, self._num_examples
        if self._num_empty_prompts:
            yield (
                f"{_of(self._num_empty_prompts, total)} examples have an empty prompt, so their answers are learned as "
                f"answers to nothing; first: {self._first_empty_prompt}"
            )
        if self._num_glued:
            yield (
                f"template plain joins prompt and completion without white space in {_of(self._num_glued, total)} "
                "examples; data.template: question-answer puts a heading before each"
            )
        for column, count in self._lost.items():
            yield f"column {column} holds something in {_of(count, total)} examples and is not used by template {name}"
        for key, count in self._thoughts.items():
            yield f"messages have {key} in {_of(count, total)} examples, and template {name} does not use it"

    def _used_of(self, raw: Mapping[str, Any], example: Example) -> set[str]:
        """The file's names of the columns that stand in the example."""
        if self._all_used:
            return set(raw)
        ours = set(example.columns) if self._template.takes_messages else set(self._template.names)
        if not self._template.takes_messages:
            # These two are the layout's own columns under names that every template may use.
            aliases = {"prompt": self._layout.prompt, "completion": (self._layout.answer,)}
            for alias, columns in aliases.items():
                if alias in ours and alias not in raw:
                    ours.update(columns)
            if "system" in ours:
                ours.update(example.columns & {"system_prompt", "system_message"})
        ours |= {self._layout.rejected, self._layout.label} - {""}
        return ours | {self._data.columns[name] for name in ours if name in self._data.columns}

    def _parts(self, example: Example) -> list[str]:
        if example.values:
            return [str(example.values[name]) for name in (*self._layout.prompt, self._layout.answer)]
        return [turn.content for turn in example.messages or ()]

    def _is_glued(self, example: Example) -> bool:
        """Whether nothing stands between prompt and answer; under `plain` only the example itself can bring it."""
        if self._template.name != "plain" or not self._layout.prompt:
            return False
        prompt, answer = example.values["prompt"], example.values[self._layout.answer]
        return bool(prompt and answer) and not (prompt[-1].isspace() or answer[0].isspace())

    def _says_preference(self, name: str, value: Any) -> bool:
        """Whether a column says of an answer that it is a good or a bad one."""
        return isinstance(value, bool) and (
            name == "kto_tag" or (name in _LABELS and self._layout.answer == "completion")
        )

    def _carries_meaning(self, name: str, value: Any) -> bool:
        if self._layout.name == "text" and name in _TREE | _LABELS:
            return True
        if name == "weight":
            return value not in (1, True, "1", "1.0", "true")
        return name in _CONTENT or name in _MEANINGFUL


def check_names(columns: Mapping[str, str], template_names: Collection[str]) -> None:
    """Refuse names of ours that nothing reads: their column would be dropped without a word.

    Args:
        columns: `DataConfig.columns`.
        template_names: names that the user's own template uses.

    Raises:
        ConfigError: names the first such name and the nearest one that is read.
    """
    known = sorted(COLUMNS.union(template_names))
    for name in columns:
        if name not in known:
            raise ConfigError(
                f"data.columns: {_writable(name)} is a name that neither a layout nor a template file of your own "
                f"uses{did_you_mean(name, known)}"
            )


def refuse_tree(examples: Iterable[Mapping[str, Any]], source: str) -> None:
    """Refuse examples that a layout of single texts was recognized for and that are messages of a tree.

    Args:
        examples: the examples, as the file names their columns.
        source: how the error calls the source.

    Raises:
        DataError: names the columns that show it, and the ways out.
    """
    if tree := sorted({name for raw in examples for name in _TREE & raw.keys() if not _is_blank(raw[name])}):
        raise DataError(
            f"{source}: the examples have a column text, but {', '.join(tree)} beside it: they are single messages of "
            f"conversations, not texts. Choose the answers to learn from and {WHOLE_CONVERSATIONS}; or set "
            "data.format: text to train on the column text alone"
        )


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _is_copy(name: str, value: Any, text: str, parts: list[str]) -> bool:
    """Whether what a column holds stands in the example already, or is itself a rendering of it or of its prompt."""
    leaves = [leaf.strip() for leaf in _leaves(value)]
    if leaves and all(leaf in text for leaf in leaves):
        return True
    # The passage of a question holds the answer, but not the question; a rendering holds both.
    rendered = parts[:-1] if name in _RENDERED_PROMPTS else parts
    return len(parts) > 1 and isinstance(value, str) and all(part.strip() in value for part in rendered)


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a value; without recursion, because a file may nest as deep as it likes."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [value[name] for name in ("content", "value", "text") if name in value]


def _writable(name: str) -> str:
    """A column's name as UTF-8 can hold it: JSON allows half a surrogate pair in a key."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"
