"""The data room's corridor: source -> layout -> template -> tokens -> data check -> examples and report."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random
from typing import Any, Literal

from expertune.config import DataConfig, ObjectiveName
from expertune.data import token_cache
from expertune.data.answers import Reader, Row
from expertune.data.column_template import Template
from expertune.data.columns import ColumnUse, check_names, refuse_tree
from expertune.data.encode import check_tokenizer
from expertune.data.examples import Tally, TokenizedExample, TokenizedExamples
from expertune.data.formats import Layout, find_layout
from expertune.data.lint import (
    ExampleError,
    FlaggedError,
    Problems,
    check_context,
    skip_report,
    stop_or_skip,
)
from expertune.data.messages import is_conversation
from expertune.data.pairs import AnswerTally, answer_warnings, require_both_labels, with_leak_told
from expertune.data.readers import SourceExample
from expertune.data.sources import Source, SourceExamples, find_source
from expertune.data.special_tokens import SpecialTokens
from expertune.data.template import default_template, is_own_file, load_template, own_file_names
from expertune.data.text_ids import TokenizesAhead
from expertune.data.trial import try_template
from expertune.errors import ConfigError, DataError, naming
from expertune.text import counted

Progress = Callable[[int, int], None]

# Rows that are tokenized in one call.
_ROWS_AT_ONCE = 64


def prepare_examples(
    data: DataConfig,
    which: Literal["train", "eval"],
    tokenizer: Any,
    progress: Progress | None = None,
    objective: ObjectiveName = "sft",
    sample_size: int | None = None,
) -> TokenizedExamples:
    """Read, render, tokenize and check the examples of a run.

    Args:
        data: the run's data section.
        which: the training or the evaluation examples.
        tokenizer: a fast transformers tokenizer with an EOS token.
        progress: called with (examples done, examples in all) now and then.
        objective: the run's; it decides what an example is: see `TokenizedExample`.
        sample_size: how many examples to look at, see `sampled`; they are not kept. None takes all.

    Returns:
        The examples in the source's order, and the report for the run record; those of a large source lie in a file.

    Raises:
        DataError: names `data.train` or `data.eval`: the source cannot be read, or examples fail the data check and
            `data.on_error` is `stop`, or none is left. One message names the first bad examples and counts them all.
        ConfigError: the template, the tokenizer or `data.eval` is not fit for it.
    """
    check_tokenizer(tokenizer)
    spec = data.train if which == "train" else data.eval
    if spec is None:
        raise ConfigError("data.eval names no examples; set it to files, a hub dataset or a slice of one")
    with naming(f"data.{which}", DataError):
        found = _prepared(find_source(spec), _Pipeline(data, objective, tokenizer, progress, sample_size))
        if which == "train" and sample_size is None:
            require_both_labels(found.report)
    return found


def _prepared(source: Source, walk: "_Pipeline") -> TokenizedExamples:
    """The examples of a source; those of a large one are looked for in files that earlier runs have kept."""
    is_large = token_cache.is_large(source)
    if is_large and walk.sample_size is None:
        given = walk.tokenizer, walk.objective
        return token_cache.kept_examples(
            token_cache.cache_key(source, walk.data, *given),
            source.name,
            lambda keep: walk.through(source.read(stream=True), keep),
            lambda report: token_cache.cache_key(source, settled(walk.data, report), *given),
        )
    examples: list[TokenizedExample] = []
    report = walk.through(source.read(stream=is_large), examples.append)
    return TokenizedExamples(examples, report)


@dataclass(frozen=True)
class _Pipeline:
    """The way of a source's rows to tokenized examples."""

    data: DataConfig
    objective: ObjectiveName
    tokenizer: Any
    progress: Progress | None
    sample_size: int | None

    def through(self, source: SourceExamples, keep: Callable[[TokenizedExample], None]) -> dict[str, Any]:
        """Hand on each example as soon as it is made; the report of all."""
        data, objective, tokenizer = self.data, self.objective, self.tokenizer
        layout, template = choose(source, data, tokenizer, objective)
        use = ColumnUse(data, layout, template, is_own_file(data.template), objective == "grpo")
        special_tokens, spelt_out = SpecialTokens(tokenizer, data.parse_special_tokens), Counter[str]()
        reader = Reader(data, objective, layout, template, special_tokens)
        tally, answers, problems, num_flagged, num_open_turns = Tally(), AnswerTally(), Problems(), 0, 0
        total, done, num_read = sum(source.num_rows.values()), 0, 0
        ahead, rows = TokenizesAhead(tokenizer), self._looked_at(source, total)
        while block := list(islice(rows, _ROWS_AT_ONCE)):
            if self.progress:
                self.progress(done, total)
            done += len(block)
            read = [reader.read(raw) for raw in block]
            ahead.take([side.rendered for each in read if isinstance(each, Row) for side in each.sides])
            for raw, row in zip(block, read, strict=True):
                try:
                    if isinstance(row, ExampleError):
                        raise row
                    use.add(row.values, row.sides[0].example, row.sides[0].rendered.text, raw.place)
                    tokenized = list(reader.tokenized(row, ahead))
                    for side in row.sides:
                        spelt_out.update(special_tokens.found(side.rendered.text))
                        num_open_turns += side.rendered.num_open_turns
                    num_read += 1
                    for example in tokenized:
                        tally.add(example)
                        answers.add(example)
                        keep(example)
                except FlaggedError:
                    num_flagged += 1
                except ExampleError as error:
                    problems.add(raw.place, str(error))
        use.require_fit(source.name)
        stop_or_skip(problems, num_read + problems.num, source.name, data.on_error)
        if not num_read:
            raise DataError(f"{source.name}: all examples ({num_flagged}) are flagged not to be trained")
        report = _how_read(source, data, layout, template) | tally.report(data.max_length) | use.report()
        spelt = dict(spelt_out)
        report |= {"num_flagged": num_flagged, "special_tokens_as_text": spelt, "num_open_turns": num_open_turns}
        report |= answers.report()
        report["warnings"] = [*report["warnings"], *_warnings(report), *answer_warnings(report)]
        return report | skip_report(problems)

    def _looked_at(self, source: SourceExamples, total: int) -> Iterator[SourceExample]:
        if self.sample_size is None:
            return iter(source.examples)
        numbers = set(sampled(total, self.sample_size))
        return (example for number, example in enumerate(source.examples) if number in numbers)


def sampled(total: int, sample_size: int) -> Sequence[int]:
    """Which of a source's examples stand for all of them, in order; all where it has not twice as many.

    The source is cut into as many equal stretches, and of each one example is drawn, always the same. So the sample is
    spread as evenly as every n-th example would be, and has no bias where examples of several kinds take turns.
    """
    if total < 2 * sample_size:
        return range(total)
    draw, bounds = Random(0), [total * number // sample_size for number in range(sample_size + 1)]
    return [draw.randrange(begin, end) for begin, end in pairwise(bounds)]


def prepare_run(
    data: DataConfig,
    tokenizer: Any,
    earlier: Mapping[str, Any] | None = None,
    context: int | None = None,
    progress: Progress | None = None,
    objective: ObjectiveName = "sft",
) -> tuple[TokenizedExamples, TokenizedExamples | None]:
    """The training and the evaluation examples of a run, both through one template.

    Args:
        data: the run's data section.
        tokenizer: see `prepare_examples`.
        earlier: reports of the same run by part, from its record, where it is resumed.
        context: tokens that the model's context holds (`expertune.checkpoint.context.context_length`).
        progress: see `prepare_examples`.
        objective: see `prepare_examples`.

    Returns:
        The training examples, and the evaluation examples where the run has any.

    Raises:
        DataError, ConfigError: see `prepare_examples`; or examples are longer than the model's context.
    """
    before, named = earlier or {}, data.format
    if report := before.get("train"):
        data = settled(data, report)
    train = prepare_examples(data, "train", tokenizer, progress, objective)
    check_context(train, context, "data.train")
    if data.eval is None:
        return train, None
    # Only the template: evaluation examples may have columns of their own, but a loss is of the form that was trained.
    update = {"template": train.report["template"], "format": (before.get("eval") or {}).get("format", named)}
    evaluation = prepare_examples(data.model_copy(update=update), "eval", tokenizer, progress, objective)
    check_context(evaluation, context, "data.eval")
    return train, with_leak_told(train, evaluation)


def settled(data: DataConfig, report: Mapping[str, Any]) -> DataConfig:
    """A run's data section with the layout and template that its examples were read with.

    What is read again later (to resume, to evaluate, to ask a question) must not be chosen anew, by other examples or
    by the defaults of another version.

    Args:
        data: the data section as the run file has it.
        report: the report of the examples, from `prepare_examples` or a record.
    """
    return data.model_copy(update={"format": report["format"], "template": report["template"]})


def choose(
    source: SourceExamples, data: DataConfig, tokenizer: Any, objective: ObjectiveName = "sft"
) -> tuple[Layout, Template]:
    """The layout by the first example that could be read, and the template by all of them.

    Raises:
        DataError: no example can be read, or no layout fits them.
        ConfigError: the template is not fit for them.
    """
    at, first = next(((each.place, each.values) for each in source.examples if each.values is not None), ("", None))
    if first is None:
        unread, count = next(iter(source.examples)), sum(source.num_rows.values())
        raise DataError(f"{source.name}: not one of {count} examples can be read; {unread.place}: {unread.problem}")
    check_names(data.columns, own_file_names(data.template))
    turns = {name for raw in source.readable for name, value in raw.items() if is_conversation(value)}
    turns |= {ours for ours, theirs in data.columns.items() if theirs in turns}
    place = source.name if objective == "sft" else at
    layout = find_layout(data, [*first, *data.columns], place, turns, objective)
    if layout.name == "text" and data.format == "auto" and not data.columns and not is_own_file(data.template):
        refuse_tree(source.readable, source.name)
    name = data.template or default_template(layout, (raw | _renamed(raw, data) for raw in source.readable))
    if name == "chat" or is_own_file(name):
        renamed = SourceExample(at, first | _renamed(first, data))
        as_it_is = data.model_copy(update={"columns": {}})

        def render() -> None:
            tokens = SpecialTokens(tokenizer, data.parse_special_tokens)
            Reader(as_it_is, objective, layout, load_template(name, layout, tokenizer), tokens).read(renamed)

        try_template(name, render)
    return layout, load_template(name, layout, tokenizer)


def _renamed(raw: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """Our names of an example's columns; a column that is missing is an error of its example, later."""
    return {ours: raw[theirs] for ours, theirs in data.columns.items() if theirs in raw}


def _how_read(source: SourceExamples, data: DataConfig, layout: Layout, template: Template) -> dict[str, Any]:
    """The beginning of a report: what was read, and how."""
    return {
        "source": source.name,
        "sha256": source.sha256,
        "files": source.num_rows,
        "format": layout.name,
        "template": template.name,
        "train_on": data.train_on,
        "max_length": data.max_length,
    }


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What the examples do that their owner may not have meant, though they can be trained on."""
    warnings = []
    if spelt_out := report["special_tokens_as_text"]:
        tokens = ", ".join(f"{token} in {counted(count, 'example')}" for token, count in sorted(spelt_out.items()))
        warnings.append(
            f"the data spells out special tokens ({tokens}); they are read as text. If they are meant as special "
            "tokens, set data.parse_special_tokens: true"
        )
    if report["num_open_turns"]:
        warnings.append(
            f"template {report['template']} ends {report['num_open_turns']} assistant turns by plain text and no "
            "special token, so that only the last turn of a conversation teaches where to stop; chatml ends every turn"
        )
    return warnings
