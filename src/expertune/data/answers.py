"""What an objective takes of a row: one answer, a pair of them, an answer with a label, or a prompt without any.

Each answer is rendered and tokenized by itself, as an example of supervised fine-tuning is, so that a prompt has the
same ids under every objective, and both sides of a pair share them.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expertune.config import DataConfig, ObjectiveName
from expertune.data.column_template import Rendered, Template
from expertune.data.encode import encode_example, encode_prompt
from expertune.data.examples import IGNORE_INDEX, TokenizedExample
from expertune.data.formats import Example, Layout, rename
from expertune.data.lint import ExampleError, check_answer, check_tokens, check_unicode
from expertune.data.messages import Message, parse_conversation, truth
from expertune.data.readers import SourceExample
from expertune.data.special_tokens import SpecialTokens, part_of, text_of, without_end

# What TRL keeps from a reward function, or gives it itself.
_NOT_HANDED_ON = frozenset({"prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids"})


@dataclass(frozen=True)
class Side:
    """A prompt with an answer, or alone.

    Attributes:
        example: as the layout read it.
        rendered: its text; a prompt alone ends in an empty answer.
    """

    example: Example
    rendered: Rendered


@dataclass(frozen=True)
class Row:
    """A row of a source, read and rendered.

    Attributes:
        place: how messages call it.
        values: its columns, as the file names them.
        sides: with each of its answers; of a pair, the preferred one first.
        label: whether the answer is a good one, where the layout has a label.
        columns: what a reward is told of a prompt alone.
    """

    place: str
    values: Mapping[str, Any]
    sides: tuple[Side, ...]
    label: bool | None = None
    columns: Mapping[str, Any] | None = None


class Reader:
    """Reads the rows of a source for an objective.

    Args:
        data: the run's data section.
        objective: the run's.
        layout: the layout of the rows.
        template: what renders them.
        special_tokens: what tells the template's special tokens from the data's.
    """

    def __init__(
        self,
        data: DataConfig,
        objective: ObjectiveName,
        layout: Layout,
        template: Template,
        special_tokens: SpecialTokens,
    ) -> None:
        self._data, self._objective, self._layout = data, objective, layout
        self._template, self._special_tokens = template, special_tokens

    def read(self, raw: SourceExample) -> Row | ExampleError:
        """A row, or why it cannot be used."""
        try:
            if raw.values is None:
                raise ExampleError(raw.problem)
            values = rename(raw.values, self._data.columns)
            if self._objective == "grpo":
                return self._prompt(raw, values)
            sides = tuple(self._side(each) for each in _answered(self._layout, values))
            if self._objective != "sft":
                for side in sides:
                    _check_prompt(side.example)
                    _check_one_answer(side.example)
            label = truth(self._layout.label, values.get(self._layout.label)) if self._layout.label else None
            return Row(raw.place, raw.values, sides, label)
        except ExampleError as error:
            return error

    def tokenized(self, row: Row, tokenizer: Any) -> Iterator[TokenizedExample]:
        """The examples that a row is; a pair is two where each answer counts by itself.

        Raises:
            ExampleError: a side cannot be encoded, nothing of it is left to train on, or the sides are the same.
        """
        if row.columns is not None:
            yield self._prompt_alone(row, tokenizer)
            return
        first, *others = [self._answer(side.rendered, row.place, tokenizer) for side in row.sides]
        if not others:
            yield dataclasses.replace(first, label=row.label) if row.label is not None else first
            return
        _check_difference(first, others[0])
        if self._objective == "kto":
            for example, label in ((first, True), (others[0], False)):
                place = f"{row.place} ({'chosen' if label else 'rejected'})"
                yield dataclasses.replace(example, label=label, place=place)
            return
        yield dataclasses.replace(first, rejected=others[0])

    def _side(self, values: Mapping[str, Any]) -> Side:
        example = self._layout.read(values)
        return Side(example, self._special_tokens.render(self._template, example))

    def _answer(self, rendered: Rendered, place: str, tokenizer: Any) -> TokenizedExample:
        data = self._data
        start, end = rendered.spans[-1]
        prompt = part_of(text_of(rendered), 0, start)
        completion = without_end(part_of(rendered.text, start, end), tokenizer.eos_token)
        check_unicode(rendered.text)
        check_answer("what the template makes of the answer", completion)
        if data.train_on == "all" and rendered.has_untrained_elsewhere:
            raise ExampleError(
                "answers that must not be trained cannot be found in the text under this template; set data.train_on: "
                "completion, or data.template: chatml"
            )
        input_ids, labels = encode_example(rendered, data.train_on, tokenizer)
        uncut_length = len(input_ids)
        input_ids, labels = input_ids[: data.max_length], labels[: data.max_length]
        check_tokens(input_ids, labels, uncut_length, tokenizer)
        return TokenizedExample(input_ids, labels, place, prompt, completion, uncut_length)

    def _prompt(self, raw: SourceExample, values: Mapping[str, Any]) -> Row:
        question, answer = _without_answer(self._layout, values)
        example = self._layout.read_question(question)
        _check_prompt(example)
        text = self._special_tokens.render_prompt(self._template, example)
        check_unicode(text)
        columns = {name: value for name, value in values.items() if name not in _NOT_HANDED_ON}
        if answer is not None:
            columns["answer"] = answer
        # As a file would hold them, wherever they come from.
        columns = json.loads(json.dumps(columns, default=str))
        assert raw.values is not None
        side = Side(example, Rendered(text, [(len(text), len(text))], append_eos=False))
        return Row(raw.place, raw.values, (side,), columns=columns)

    def _prompt_alone(self, row: Row, tokenizer: Any) -> TokenizedExample:
        """Never cut: an answer to half a question teaches nothing."""
        prompt = row.sides[0].rendered.text
        ids = encode_prompt(prompt, tokenizer)
        if len(ids) > self._data.max_length:
            raise ExampleError(
                f"the prompt has {len(ids)} tokens, more than data.max_length: {self._data.max_length}; raise that or "
                "shorten the prompt"
            )
        found = (row.columns or {}).get("answer")
        answer = found if isinstance(found, str) else ""  # which a task's metric compares with
        labels = [IGNORE_INDEX] * len(ids)
        return TokenizedExample(ids, labels, row.place, prompt, answer, len(ids), columns=row.columns)


def _answered(layout: Layout, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row's columns with each of its answers in the layout's place for it."""
    if not layout.rejected:
        return [values]
    for name in (layout.answer, layout.rejected):
        if name not in values:
            raise ExampleError(f"column {name} is missing, and a pair has two answers; add it or delete the example")
        if not isinstance(values[name], str | list):
            what = "empty" if values[name] is None else type(values[name]).__name__
            raise ExampleError(f"column {name} is {what}, and no answer; write text or a list of messages")
        if isinstance(values[name], str):
            check_answer(name, values[name])
    if values[layout.answer] == values[layout.rejected]:
        raise ExampleError(f"{layout.answer} and {layout.rejected} are the same, so nothing can be preferred; {_FIX}")
    if layout.is_conversation:
        values = _with_prompt(layout, values)
    return [values, {**values, layout.answer: values[layout.rejected]}]


_FIX = "correct one of them or delete the example"


def _with_prompt(layout: Layout, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair of whole conversations with their common beginning as the prompt, as TRL reads them."""
    names = (layout.answer, layout.rejected)
    if any(isinstance(values[name], str) for name in names):
        if layout.prompt[0] not in values:
            raise ExampleError(f"{names[0]} and {names[1]} must be lists of messages, where there is no column prompt")
        return values
    chosen, rejected = (parse_conversation(values[name], name) for name in names)
    if layout.prompt[0] in values and (not chosen or chosen[0].role == "assistant"):
        return values
    count = 0
    while count < min(len(chosen), len(rejected)) and _same(chosen[count], rejected[count]):
        count += 1
    if not count:
        raise ExampleError(
            f"{names[0]} and {names[1]} are whole conversations, and differ from their first message on; both must "
            "begin with the prompt that they answer"
        )
    raw = {name: values[name] for name in names}
    both = {layout.prompt[0]: raw[names[0]][:count], **{name: value[count:] for name, value in raw.items()}}
    return {**values, **both}


def _same(first: Message, other: Message) -> bool:
    return (first.role, first.content, first.extra) == (other.role, other.content, other.extra)


def _without_answer(layout: Layout, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The columns of a row whose answer is to be written, and the answer that the row holds."""
    held = values.get(layout.answer)
    if not layout.is_conversation:
        return values, held if isinstance(held, str) else None
    if held is None or isinstance(held, str):
        return values, held
    turns = parse_conversation(held, layout.answer)
    answer = turns[-1].content if turns and turns[-1].role == "assistant" else None
    return ({**values, layout.answer: held[:-1]} if answer is not None else values), answer


def _check_prompt(example: Example) -> None:
    if example.has_empty_prompt:
        raise ExampleError("empty prompt: there is nothing that is answered; fill it in or delete the example")


def _check_one_answer(example: Example) -> None:
    """One turn is preferred to one other."""
    count = sum(turn.role == "assistant" and turn.trained for turn in example.messages or ())
    if example.messages and count != 1:
        raise ExampleError(
            f"an answer has {count} assistant turns, and answers of one turn are compared; put the turns before the "
            "last into the prompt"
        )


def _check_difference(chosen: TokenizedExample, rejected: TokenizedExample) -> None:
    if chosen.prompt_ids != rejected.prompt_ids:
        raise ExampleError(
            "the template writes another prompt for the rejected answer than for the chosen one; set data.template to "
            "one whose prompt does not depend on the answer"
        )
    if chosen.input_ids != rejected.input_ids:
        return
    longest = max(chosen.uncut_length, rejected.uncut_length)
    if longest > len(chosen.input_ids):
        raise ExampleError(
            f"cut at data.max_length: {len(chosen.input_ids)}, both answers are the same; the longer has {longest} "
            "tokens with its prompt: raise data.max_length or shorten the prompt"
        )
    raise ExampleError(f"both answers become the same tokens, so nothing can be preferred; {_FIX}")
