"""Column templates: one Jinja file renders a whole example, and the answer's part of the text is found by itself.

The file is rendered twice, once with the example's answer and once with a sentinel in its place. What stands before the
sentinel is the prompt; the rest of the true rendering is the completion. So a user's own file needs no special syntax.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertune.config.yaml_file import shortened
from expertune.data.formats import Example
from expertune.data.lint import ExampleError
from expertune.errors import ConfigError

# Digits, so that filters such as `upper`, `trim` and `tojson` leave it as it is; too many to stand in a row by chance.
_SENTINEL = "60486073512907415238264907131859"


@dataclass(frozen=True)
class Rendered:
    """An example as text.

    Attributes:
        text: the whole example.
        spans: (start, end) in characters of each trained part, in order; the last one starts where the prompt ends.
        append_eos: whether the tokenizer's EOS still has to follow the text.
        untrained: (start, end) of answers that take no loss, even where the loss is taken on the whole example.
        has_untrained_elsewhere: there are more of these, whose place the template does not show.
        num_open_turns: trained turns before the last that end in no special token, so that their end is not learned.
    """

    text: str
    spans: list[tuple[int, int]]
    append_eos: bool
    untrained: tuple[tuple[int, int], ...] = ()
    has_untrained_elsewhere: bool = False
    num_open_turns: int = 0


class Template(Protocol):
    """What renders an example: a Jinja file over its columns, or a chat template over its messages.

    Attributes:
        name: how messages and the record call it.
        names: every name and key that its Jinja text uses.
        takes_messages: whether it renders the example as a conversation, and not column by column.
    """

    name: str
    names: frozenset[str]
    takes_messages: bool

    def render(self, example: Example) -> Rendered:
        """The example as text, with its trained parts. Raises ExampleError where the example cannot be rendered."""

    def render_prompt(self, example: Example) -> str:
        """Only what stands in front of the answer, for generation. Raises ExampleError likewise."""


def jinja_names(source: str) -> frozenset[str]:
    """Every name, attribute and string key in a Jinja text; none where it cannot be read.

    Lexed, not parsed: chat templates may hold tags that only transformers knows, such as `{% generation %}`.
    """
    try:
        tokens = list(jinja2.Environment().lex(source))
    except jinja2.TemplateSyntaxError:
        return frozenset()
    return frozenset(value.strip("'\"") for _, kind, value in tokens if kind in ("name", "string"))


class ColumnTemplate:
    """A Jinja file over an example's columns.

    Args:
        name: how messages and the record call it.
        source: the Jinja text.

    Raises:
        ConfigError: the text is not valid Jinja.
    """

    takes_messages = False

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.names = jinja_names(source)
        self._source = source
        # Sandboxed because a template may come with a downloaded run file; strict because a misspelled column must
        # not read as an empty one.
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"template {name}: line {error.lineno}: {error.message}") from None
        except Exception as error:  # blocks or brackets too deep for Jinja, or for the Python that it writes
            raise ConfigError(f"template {name}: cannot be compiled ({type(error).__name__}: {error})") from None

    @property
    def variables(self) -> frozenset[str]:
        """The columns that the text uses, whether or not it can do without them."""
        return frozenset(jinja2.meta.find_undeclared_variables(self._template.environment.parse(self._source)))

    def render(self, example: Example) -> Rendered:
        """The example as text; from the end of the prompt on, everything is trained.

        Raises:
            ConfigError: the template does not use the answer exactly once.
            ExampleError: a column that the template uses is missing, or the text before the answer depends on the
                answer.
        """
        prompt = self.render_prompt(example)
        text = self._render(example.values)
        if not text.startswith(prompt):
            raise ExampleError(
                f"template {self.name} writes another prompt for this answer; the prompt must not use it"
            )
        # EOS always follows: text of a template that spells an EOS out (as `dolly-tutorial` does) is only text.
        return Rendered(text, [(len(prompt), len(text))], append_eos=True)

    def render_prompt(self, example: Example) -> str:
        """The text in front of the answer, without trailing spaces: these belong to the completion.

        Tokenizers join a space with the word after it, so a prompt that ends in one leads generation astray.

        Raises:
            ConfigError: the template does not use the answer exactly once.
            ExampleError: a column that the template uses is missing.
        """
        values = {**example.values, **dict.fromkeys(example.answers, _SENTINEL)}
        before, *after = self._render(values).split(_SENTINEL)
        if len(after) != 1:
            raise ConfigError(
                f"template {self.name} uses the answer {len(after)} times; "
                f"use {' or '.join(f'{{{{ {name} }}}}' for name in sorted(example.answers))} exactly once"
            )
        return before.rstrip(" ")

    def _render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(values)
        except Exception as error:  # a template is a program of the user's, and may fail in any way
            reason, names = shortened(str(error) or type(error).__name__), shortened(", ".join(values))
            raise ExampleError(f"template {self.name}: {reason}; the example has {names}") from None
