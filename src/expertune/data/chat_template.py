"""Chat templates: a conversation as text, with every assistant turn found in it.

Templates with `{% generation %}` blocks say themselves which part is the assistant's. For the others the conversation
is rendered turn by turn: an assistant turn is what its rendering adds to the rendering before it. That holds only where
each rendering is a prefix of the next, which is checked.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from expertune.config.yaml_file import shortened
from expertune.data.column_template import Rendered, jinja_names
from expertune.data.formats import Example
from expertune.data.lint import ExampleError
from expertune.data.messages import Message
from expertune.data.special_tokens import RenderedText, special_contents, special_pattern
from expertune.errors import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A Jinja file over a list of messages, rendered by transformers as at serving time.

    Args:
        name: how messages and the record call it.
        source: the Jinja text, or None for the tokenizer's own chat template.
        tokenizer: a transformers tokenizer; its special tokens are the template's variables.

    Raises:
        ConfigError: the tokenizer has no chat template of its own.
    """

    takes_messages = True

    def __init__(self, name: str, source: str | None, tokenizer: Any) -> None:
        self.name = name
        if source is None:
            try:
                source = tokenizer.get_chat_template()
            except ValueError:
                raise ConfigError(
                    "data.template: the tokenizer has no chat template, as base models do; use chatml, or a Jinja "
                    "file that loops over messages"
                ) from None
        self._source = source
        self._tracks = _GENERATION.search(source) is not None
        self.names = jinja_names(source)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._eos = tokenizer.eos_token
        # A token that begins a text ends none, so nobody stops at it.
        contents = special_contents(tokenizer)
        ends = [token for token in contents.values() if token != tokenizer.bos_token or token == tokenizer.eos_token]
        self._end_tokens = tuple(ends)
        self._end_behind = re.compile(rf"\s*(?:{special_pattern(ends).pattern})")

    def render(self, example: Example) -> Rendered:
        """The conversation as text; each assistant turn is a trained part, up to and with its EOS.

        Raises:
            ConfigError: the template is not valid Jinja.
            ExampleError: the template refuses the conversation, or its assistant turns cannot be told apart.
        """
        messages = example.messages or []
        text, marked = self._render(messages)
        spans: Sequence[tuple[int, int] | None] = marked if self._tracks else self._spans_by_prefix(messages, text)
        if not spans:
            raise ExampleError(f"template {self.name} renders no assistant turn of this conversation")
        trained, untrained = self._by_flag(messages, spans)
        rendered = self._end(text, [self._up_to_eos(text, span) for span in trained])
        placed = [span for span in untrained if span is not None]
        return replace(rendered, untrained=tuple(placed), has_untrained_elsewhere=len(placed) < len(untrained))

    def render_prompt(self, example: Example) -> str:
        """The conversation up to where the assistant's next turn starts.

        Raises:
            ExampleError: the template refuses the conversation.
        """
        messages = example.messages or []
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        text, marked = self._render(messages, add_generation_prompt=True)
        if not self._tracks:
            answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
            marked = [span for index in answers if (span := self._span_by_prefix(messages, index, text))]
        # Earlier answers are tokenized as they are in a training example.
        return RenderedText(text, answer_starts=[start for start, _ in marked])

    def _render(
        self, messages: list[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[[message.as_dict() for message in messages]],
                chat_template=self._source,
                return_assistant_tokens_mask=self._tracks,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"template {self.name}: line {error.lineno}: {error.message}") from None
        except Exception as error:  # a template is a program of someone else's, and may fail in any way
            reason = shortened(str(error) or type(error).__name__)
            raise ExampleError(f"template {self.name} refuses this conversation: {reason}") from None
        return texts[0], spans[0] if self._tracks else []

    def _spans_by_prefix(self, messages: list[Message], text: str) -> list[tuple[int, int] | None]:
        """Where each assistant turn lies; None for one that is not trained and is written otherwise by itself."""
        spans: list[tuple[int, int] | None] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            span = self._span_by_prefix(messages, index, text)
            if span is None and message.trained:
                raise ExampleError(
                    f"template {self.name} writes message {index + 1} differently once its answer or later turns "
                    "follow, so the trained part cannot be told from the rest; set data.template to chatml, or to a "
                    "Jinja file with {% generation %} blocks, or flag all turns but the last (weight: 0)"
                )
            spans.append(span)
        return spans

    def _span_by_prefix(self, messages: list[Message], index: int, text: str) -> tuple[int, int] | None:
        """Where one assistant turn lies in the whole; None where it is written otherwise by itself."""
        before, _ = self._render(messages[:index], add_generation_prompt=True)
        after, _ = self._render(messages[: index + 1])
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        return None

    def _by_flag(
        self, messages: list[Message], spans: Sequence[tuple[int, int] | None]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int] | None]]:
        """The turns that are trained, and those that the data exclude."""
        flags = [message.trained for message in messages if message.role == "assistant"]
        if all(flags):
            return [span for span in spans if span], []
        if len(flags) != len(spans):
            raise ExampleError(
                f"template {self.name} marks {len(spans)} parts for {len(flags)} assistant turns, so the turns that "
                "are flagged not to be trained cannot be found among them; set data.template to chatml"
            )
        pairs = list(zip(spans, flags, strict=True))
        return [span for span, flag in pairs if flag and span], [span for span, flag in pairs if not flag]

    def _up_to_eos(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        # Many templates end a turn in EOS and a line break; generation stops at EOS, so the break is never written.
        start, end = span
        turn = text[start:end].rstrip()
        return (start, start + len(turn)) if turn.endswith(self._eos) else span

    def _end(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        *earlier, (start, last) = spans
        earlier = [self._with_end(text, span) for span in earlier]
        num_open = sum(not self._ends_in_token(text[start:end]) for start, end in earlier)
        spans = [*earlier, (start, last)]
        if text[:last].endswith(self._eos):
            return Rendered(text[:last], spans, append_eos=False, num_open_turns=num_open)
        rest = text[last:].rstrip()
        if rest and not rest.endswith(self._eos):
            raise ExampleError(
                f"the end of the answer is masked: template {self.name} writes {rest[:40]!r} behind it, outside the "
                "part that it marks as the assistant's, so the model would not learn to stop; put it inside the "
                "template's {% generation %} block, or set data.template"
            )
        # Closed by an EOS outside the part that the template marks: kept as written, for the data check to see.
        return Rendered(text[:last] + rest, spans, append_eos=not rest, num_open_turns=num_open)

    def _with_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        # Some templates (GLM's) end a turn by the token of the next role. It belongs to the turn: a model that never
        # writes it goes on with the user's words.
        start, end = span
        if self._ends_in_token(text[start:end]):
            return span
        behind = self._end_behind.match(text, end)
        return (start, behind.end()) if behind else span

    def _ends_in_token(self, turn: str) -> bool:
        return turn.rstrip().endswith(self._end_tokens)
