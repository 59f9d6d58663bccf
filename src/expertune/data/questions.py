"""Questions to a run, put through the template of its examples: a prompt reads as those that it was tuned on."""

from collections.abc import Mapping
from typing import Any

from expertune.config import DataConfig
from expertune.data import token_cache
from expertune.data.column_template import ColumnTemplate
from expertune.data.encode import encode_prompt
from expertune.data.formats import HISTORY, LAYOUTS, SYSTEM, Layout
from expertune.data.lint import ExampleError
from expertune.data.prepare import choose
from expertune.data.sources import find_source
from expertune.data.special_tokens import SpecialTokens
from expertune.data.template import load_template
from expertune.errors import ConfigError, DataError, did_you_mean, naming

# One text: the user's message of a conversation, else the prompt (`instruction`, `question`) without context. Or the
# columns of an example without its answer; of a conversation, `messages` up to the user's last turn.
Question = str | Mapping[str, Any]


class Questions:
    """What a run can be asked, and the prompts that come of it.

    Args:
        data: the data section of the run, best with `format` and `template` as the report of its examples has them;
            where they are left open, the columns of `data.train` decide again, so that source must still be there.
        tokenizer: the run's tokenizer.

    Attributes:
        template: what renders the questions.
        layout: the layout of a question that is one text.

    Raises:
        DataError, ConfigError: there is no such template, or it cannot be told which.
    """

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        # Two kinds of columns go by one name, which matters only for the default template.
        self._layouts = [layout for layout in LAYOUTS if layout.name == data.format]
        if len(self._layouts) == 1 or (self._layouts and data.template is not None):
            self.template = load_template(data.template, self._layouts[0], tokenizer)
        else:
            with naming("data.train", DataError):
                source = find_source(data.train)
                layout, self.template = choose(source.read(stream=token_cache.is_large(source)), data, tokenizer)
            self._layouts = [layout]
        by_answer = (layout for layout in self._layouts if layout.answer in self.template.names)
        self.layout = next(by_answer, self._layouts[0])
        self._special_tokens = SpecialTokens(tokenizer, data.parse_special_tokens)

    @property
    def main_column(self) -> str:
        """The column of a question that is one text."""
        return self.layout.main_column

    @property
    def main_columns(self) -> set[str]:
        """Every name of the column that a question of one text goes to."""
        ours = {layout.main_column for layout in self._layouts}
        return ours | {self.data.columns[name] for name in ours if name in self.data.columns}

    @property
    def answers(self) -> set[str]:
        """The columns of an example that hold its answer, which a question has no use of."""
        if self.layout.is_conversation and not self.layout.prompt:
            return set()
        of_layouts = {name for each in self._layouts for name in (each.answer, each.rejected, each.label)}
        return {"completion", *of_layouts} - {""}

    @property
    def columns(self) -> list[str]:
        """The columns that a question may have, under our names and the file's; the main one first."""
        layout = self.layout
        if isinstance(self.template, ColumnTemplate):
            used = set(self.template.variables) - self.answers
            used |= {name for each in self._layouts for name in each.prompt} if "prompt" in used else set()
            used |= set(SYSTEM) if "system" in used else set()
        else:
            used = {*layout.prompt, *SYSTEM} | (set() if layout.is_conversation else {HISTORY})
        used |= {self.data.columns[name] for name in used if name in self.data.columns}
        return [self.main_column, *sorted(used - {self.main_column})]

    def require_columns(self, names: Mapping[str, Any]) -> None:
        """Refuse columns that no question has.

        Raises:
            ConfigError: names the first such column, and those that there are.
        """
        for name in names:
            if name not in self.columns:
                raise ConfigError(
                    f"column {name}: no prompt of this run has it, whose template is {self.template.name}"
                    f"{did_you_mean(name, self.columns)}"
                )

    def require_place_for(self, system: str, question: Question) -> None:
        """Refuse a system prompt that this template refuses, or leaves out of what it makes of a question.

        Raises:
            ConfigError: says which.
        """
        without = self.render(question)
        instead = "write it into the prompt"
        try:
            found = self.render(self.asked(question, {"system": system}))
        except ExampleError as error:
            raise ConfigError(f"system: {error}; {instead}") from None
        if found == without:
            raise ConfigError(f"system: template {self.template.name} has no place for a system prompt; {instead}")

    def asked(self, question: Question, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """A question with more columns; its own come first."""
        return {**columns, **({self.main_column: question} if isinstance(question, str) else question)}

    def render(self, question: Question) -> str:
        """The text that precedes the answer in a training example.

        Special tokens that the question spells out are text, unless `data.parse_special_tokens` is set.

        Raises:
            DataError: the template uses a column that the question lacks.
            ConfigError: the template is not fit for it.
        """
        raw = dict(self.asked(question, {}))
        for ours, theirs in self.data.columns.items():
            # A question may be given under our names or the file's, and a template may use either.
            if theirs in raw:
                raw.setdefault(ours, raw[theirs])
            elif ours in raw:
                raw[theirs] = raw[ours]
        return self._special_tokens.render_prompt(self.template, self._layout_of(raw).read_question(raw))

    def encode(self, question: Question) -> list[int]:
        """Ids of the rendered question. Raises what `render` does."""
        return encode_prompt(self.render(question), self.tokenizer)

    def _layout_of(self, raw: Mapping[str, Any]) -> Layout:
        fitting = (layout for layout in [self.layout, *self._layouts] if layout.main_column in raw)
        return next(fitting, self.layout)
