"""Examples of a run as it will train on them: indexed, counted and looked at before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from markupsafe import Markup

from expertune.config import DataConfig, RunConfig
from expertune.config.arguments import checked
from expertune.data.examples import TokenizedExample, TokenizedExamples
from expertune.data.preview import preview, read_examples, shown_example
from expertune.notebook.html import as_html, render
from expertune.report.preview import counts_of, render_preview
from expertune.run.source import load_config
from expertune.text import shortened

# What a notebook shows of a source: so many examples, and so many characters of a piece of text.
_NUM_SHOWN, _MAX_CHARS = 3, 4000


@dataclass(frozen=True, repr=False)
class Example:
    """One example. `print` writes its text; a notebook shows that with the trained part in color.

    Attributes:
        tokenized: ids, labels, place and texts.
        tokenizer: the model's.
    """

    tokenized: TokenizedExample
    tokenizer: Any

    @property
    def input_ids(self) -> list[int]:
        """Token ids, cut at `data.max_length`."""
        return self.tokenized.input_ids

    @property
    def labels(self) -> list[int]:
        """The same, with -100 in place of tokens that are not trained."""
        return self.tokenized.labels

    @property
    def prompt(self) -> str:
        """The text in front of the answer."""
        return self.tokenized.prompt

    @property
    def completion(self) -> str:
        """The answer, without the text that ends it."""
        return self.tokenized.completion

    @property
    def rejected(self) -> "Example | None":
        """Of a pair, the same prompt with the answer that this one is preferred to."""
        other = self.tokenized.rejected
        return None if other is None else Example(other, self.tokenizer)

    @property
    def label(self) -> bool | None:
        """Whether the answer is a good one, where the data says so of each."""
        return self.tokenized.label

    def __str__(self) -> str:
        return "".join(part["text"] for part in self._shown()["parts"])

    def __repr__(self) -> str:
        return f"Example({self.tokenized.place}: {counts_of(self._shown())})"

    def _repr_html_(self) -> str:
        return _as_html([self])

    def _shown(self) -> dict[str, Any]:
        return shown_example(self.tokenized, self.tokenizer)


class Examples(Sequence[Example]):
    """The examples of one source, in its order. A notebook shows how they were read, and the first of them.

    Args:
        part: `train` or `eval`.
        tokenized: the examples and their report.
        data: the run's data section.
        tokenizer: the model's.
    """

    def __init__(self, part: str, tokenized: TokenizedExamples, data: DataConfig, tokenizer: Any) -> None:
        self.tokenized, self.eval = tokenized, None
        self._part, self._data, self._tokenizer = part, data, tokenizer

    eval: "Examples | None"
    """The run's evaluation examples, where these are its training examples."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example before `data.max_length` cuts it."""
        return list(self.tokenized.uncut_lengths)

    @property
    def report(self) -> dict[str, Any]:
        """How the examples were read, and what the data check found: `data.train` or `data.eval` of a record."""
        return self.tokenized.report

    def __len__(self) -> int:
        return len(self.tokenized.examples)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        return Example(self.tokenized.examples[at], self._tokenizer)

    def __repr__(self) -> str:
        return f"Examples({len(self)} of {self.report['source']})"

    def _repr_html_(self) -> str:
        facts = as_html(
            render_preview(self._part, preview(self.tokenized, self._data, self._tokenizer, num_examples=0))
        )
        return _as_html(self[:_NUM_SHOWN], facts)


@checked
def examples(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Examples:
    """The training examples of a run, tokenized and checked as the run does it; `.eval` are the evaluation examples.

    Needs the model's tokenizer alone; no weights are loaded.

    Args:
        config: see `finetune`.
        overrides: see `finetune`.
        trust_remote_code: run Python that ships with the model's tokenizer.

    Raises:
        ExpertuneError: what a run would stop at, as far as it concerns data and tokenizer.
    """
    config = load_config(config, overrides, starts=False)
    train, evaluation, tokenizer = read_examples(config, trust_remote_code)
    found = Examples("train", train, config.data, tokenizer)
    found.eval = Examples("eval", evaluation, config.data, tokenizer) if evaluation else None
    return found


def _as_html(shown: Sequence[Example], facts: str = "") -> str:
    examples = []
    for each in shown:
        example = each._shown()
        parts, rejected = (
            [{**part, "text": shortened(part["text"], _MAX_CHARS)} for part in side["parts"]]
            for side in (example, example.get("rejected", {"parts": []}))
        )
        examples.append(
            {
                "place": example["place"],
                "counts": counts_of(example),
                "parts": parts,
                "rejected": [part for part in rejected if part["trained"]],
                "columns": [
                    (name, shortened(str(value), _MAX_CHARS)) for name, value in example.get("columns", {}).items()
                ],
            }
        )
    return render("examples.html", facts=Markup(facts), examples=examples)
