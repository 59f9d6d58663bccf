"""Special tokens come from the template alone: data that spells one out stays text.

An example that spells out no special token, which is nearly every example, is rendered once and takes the tokenizer's
own way. Any other is rendered a second time with those characters replaced by private ones. The template's special
tokens stand in both renderings, so what differs is the data's; `encode` is told by `RenderedText.plain`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from expertune.data.column_template import Rendered, Template
from expertune.data.formats import Example
from expertune.data.lint import ExampleError

_PRIVATE = 0x100000
"""The first of the private characters (Unicode plane 16) that stand for the characters of special tokens."""


class RenderedText(str):
    """Rendered text that knows where the data spells out (a part of) a special token, and where answers start.

    Attributes:
        plain: (start, end) in characters of each such place, in order; what overlaps them is never a special token.
        answer_starts: the character at which each answer starts, in order; no token lies across one.
    """

    plain: tuple[tuple[int, int], ...]
    answer_starts: tuple[int, ...]

    def __new__(
        cls, text: str, plain: Iterable[tuple[int, int]] = (), answer_starts: Iterable[int] = ()
    ) -> "RenderedText":
        """Text with its plain places and the starts of its answers."""
        self = super().__new__(cls, text)
        self.plain = tuple(plain)
        self.answer_starts = tuple(answer_starts)
        return self


def plain_places(text: str) -> tuple[tuple[int, int], ...]:
    """Where special tokens in `text` are only text; nowhere in a string that is not a `RenderedText`."""
    return text.plain if isinstance(text, RenderedText) else ()


def answer_starts(text: str) -> tuple[int, ...]:
    """Where answers start in `text`; nowhere in a string that is not a `RenderedText`."""
    return text.answer_starts if isinstance(text, RenderedText) else ()


def text_of(rendered: Rendered) -> str:
    """The text of an example that knows where its answers start, those that take no loss among them."""
    starts = sorted({start for start, _ in (*rendered.spans, *rendered.untrained)})
    return RenderedText(rendered.text, plain_places(rendered.text), starts)


def part_of(text: str, start: int, end: int) -> str:
    """`text[start:end]` that keeps its plain places, and the answers that start inside it."""
    kept = [(max(a, start) - start, min(b, end) - start) for a, b in plain_places(text) if a < end and b > start]
    starts = [each - start for each in answer_starts(text) if start < each < end]
    return RenderedText(text[start:end], kept, starts) if kept or starts else str(text[start:end])


def without_end(text: str, eos: str) -> str:
    """`text` without the EOS tokens at its end; an EOS that the data spells out is text and stays."""
    while text.endswith(eos) and not plain_places(part_of(text, len(text) - len(eos), len(text))):
        text = part_of(text, 0, len(text) - len(eos))
    return text


def special_contents(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's special tokens: id -> text."""
    return {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def special_pattern(contents: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens as tokenizers do: from the left, the longest where several begin."""
    by_length = sorted(filter(None, contents), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or "(?!)")


class SpecialTokens:
    """Renders examples so that special tokens of the template and of the data are told apart.

    Args:
        tokenizer: a fast transformers tokenizer.
        parse: `DataConfig.parse_special_tokens`: special tokens in the data are special tokens too.
    """

    def __init__(self, tokenizer: Any, parse: bool) -> None:
        contents = set(special_contents(tokenizer).values())
        self._parse = parse
        self._eos: str = tokenizer.eos_token
        self._pattern = special_pattern(contents)
        # A token may also come about where the data meets the template, or one column the next: "<" and "/s>".
        self._starts = {token[:end] for token in contents for end in range(1, len(token))}
        self._ends = {token[start:] for token in contents for start in range(1, len(token))}
        # With which character a text begins and ends that holds such a part: nearly no text does.
        self._heads, self._tails = {each[0] for each in self._ends}, {each[-1] for each in self._starts}
        self._insides = {each[:end] for each in self._ends for end in range(1, len(each) + 1)}
        self._longest = max(map(len, contents), default=1) - 1
        private = {char: chr(_PRIVATE + index) for index, char in enumerate(sorted(set("".join(contents))))}
        self._to_private = str.maketrans(private)
        self._from_private = str.maketrans({there: here for here, there in private.items()})
        self._private = re.compile(f"[{chr(_PRIVATE)}-{chr(_PRIVATE + max(len(private) - 1, 0))}]+")

    def found(self, text: str) -> set[str]:
        """The special tokens that the data spells out in a rendered text."""
        return {token for start, end in plain_places(text) for token in self._pattern.findall(text[start:end])}

    def render(self, template: Template, example: Example) -> Rendered:
        """`template.render`, its text a `RenderedText` where the data spells out special tokens.

        Raises:
            ExampleError: see `Template`, or the template changes such a text so that it cannot be followed.
        """
        rendered = template.render(example)
        if self._parse:
            return self._ended_once(rendered, example)
        if not self._in_data(example):
            return rendered
        marked = template.render(self._marked(example))
        text = self._told_apart(template, rendered.text, marked.text)
        # What the template's own tokens say of turns and their ends is right, and not what the data spells out.
        return rendered if text is rendered.text else dataclasses.replace(marked, text=text)

    def render_prompt(self, template: Template, example: Example) -> str:
        """`template.render_prompt` likewise."""
        prompt = template.render_prompt(example)
        if not self._in_data(example):
            return prompt
        return self._told_apart(template, prompt, template.render_prompt(self._marked(example)))

    def _ended_once(self, rendered: Rendered, example: Example) -> Rendered:
        """An example whose answer brings its EOS, as text that was rendered before does, ends in that one."""
        answers = [example.values[name] for name in example.answers]
        is_ended = any(isinstance(answer, str) and answer.rstrip().endswith(self._eos) for answer in answers)
        text = rendered.text.rstrip()
        if not (rendered.append_eos and is_ended and text.endswith(self._eos)):
            return rendered
        # Generation stops at EOS, so a line break behind it is never written.
        spans = [(start, min(end, len(text))) for start, end in rendered.spans]
        return dataclasses.replace(rendered, text=text, spans=spans, append_eos=False)

    def _told_apart(self, template: Template, text: str, marked: str) -> str:
        restored = RenderedText(
            marked.translate(self._from_private),
            (match.span() for match in self._private.finditer(marked)),
            answer_starts(marked),
        )
        # The end of a text may differ: an EOS that the data spells out looked like the template's.
        if restored.startswith(text) or text.startswith(restored):
            return restored
        # A template may test what the data says, or write it otherwise (as `tojson` does); that is right as long as
        # none of its special tokens comes from there.
        if self._pattern.findall(text) == self._pattern.findall(marked):
            return text
        token = (self._pattern.findall(text) or [""])[0]
        raise ExampleError(
            f"template {template.name} changes what the example spells out as a special token (such as {token}), so "
            "that the two cannot be told apart; take it out of the example, or set data.parse_special_tokens: true"
        )

    def _in_data(self, example: Example) -> bool:
        if self._parse:
            return False
        messages = example.messages or []
        texts = _texts([dict(example.values), *([message.content, dict(message.extra)] for message in messages)])
        return any(self._may_spell_out(text) and any(True for _ in self._spelt_out(text)) for text in texts)

    def _marked(self, example: Example) -> Example:
        messages = example.messages
        if messages is not None:
            messages = [
                dataclasses.replace(each, content=self._mark(each.content), extra=self._mark(dict(each.extra)))
                for each in messages
            ]
        return dataclasses.replace(example, values=self._mark(dict(example.values)), messages=messages)

    def _mark(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._mark(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        if not isinstance(value, str):
            return value
        if self._private.search(value):
            raise ExampleError("holds private characters of Unicode beside special tokens; take one of the two out")
        for start, end in self._spelt_out(value):
            value = value[:start] + value[start:end].translate(self._to_private) + value[end:]
        return value

    def _may_spell_out(self, text: str) -> bool:
        """Whether a text is worth a closer look."""
        at_edge = text != "" and (text[0] in self._heads or text[-1] in self._tails)
        return at_edge or self._pattern.search(text) is not None

    def _spelt_out(self, text: str) -> Iterator[tuple[int, int]]:
        """Places of special tokens in a text of the data, and of what its surroundings could make one of."""
        yield from (match.span() for match in self._pattern.finditer(text))
        if text in self._insides:
            yield 0, len(text)
            return
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[:length] in self._ends:
                yield 0, length
                break
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._starts:
                yield len(text) - length, len(text)
                break


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
