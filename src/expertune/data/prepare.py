"""The data room's corridor: source -> layout -> template -> tokens -> data check -> rows and report."""

from collections.abc import Mapping
from typing import Any, Literal

from expertune.config import DataConfig
from expertune.data.encode import check_tokenizer, encode_row
from expertune.data.formats import LAYOUTS, Layout, find_layout, rename
from expertune.data.lint import Problem, RowError, check_answer, check_tokens, check_unicode, skip_report, stop_or_skip
from expertune.data.row_template import Rendered, Template
from expertune.data.rows import IGNORE_INDEX, TokenizedRow, TokenizedRows, length_summary
from expertune.data.sources import Source, read_source
from expertune.data.template import load_template
from expertune.errors import ConfigError, DataError


def prepare_rows(data: DataConfig, which: Literal["train", "eval"], tokenizer: Any) -> TokenizedRows:
    """Read, render, tokenize and check the rows of a run.

    Args:
        data: the run's data section.
        which: the training or the evaluation rows.
        tokenizer: a fast transformers tokenizer with an EOS token.

    Returns:
        The rows in the source's order, and the report for the run record.

    Raises:
        DataError: the source cannot be read, or rows fail the data check and `data.on_error` is `stop`, or none is
            left. One message names the first bad rows and counts them all.
        ConfigError: the template, the tokenizer or `data.eval` is not fit for it.
    """
    check_tokenizer(tokenizer)
    spec = data.train if which == "train" else data.eval
    if spec is None:
        raise ConfigError("data.eval names no rows; set it to a file, a hub dataset or a slice of one")
    source = read_source(spec)
    layout = _layout(source, data)
    template = load_template(data.template, layout, tokenizer)
    rows, problems = [], []
    for row in source.rows:
        try:
            if row.values is None:
                raise RowError(row.problem)
            example = layout.read(rename(row.values, data.columns))
            rows.append(_tokenized(template.render(example), row.place, data, tokenizer))
        except RowError as error:
            problems.append(Problem(row.place, str(error)))
    stop_or_skip(problems, len(source.rows), spec, data.on_error)
    return TokenizedRows(rows, _report(source, layout, template, data, rows) | skip_report(problems))


def render_prompt(values: Mapping[str, Any] | str, data: DataConfig, tokenizer: Any) -> str:
    """Put a user's own question through the template of a run.

    Args:
        values: the row's columns without the answer (a conversation: `messages` up to the user's last turn), or one
            text: the user's message of a conversation, else the prompt (`instruction`, `question`) without context.
        data: the data section of the run, best with `format` and `template` as the report of its rows has them; where
            they are left open, the columns of `data.train` decide again, so that source must still be there.
        tokenizer: the run's tokenizer.

    Returns:
        The text that precedes the answer in a training row; `encode_prompt` turns it into ids.

    Raises:
        DataError: the template uses a column that `values` lacks.
        ConfigError: the template is not fit for it.
    """
    named = [layout for layout in LAYOUTS if layout.name == data.format]
    # Two kinds of columns go by one name, which matters only for the default template.
    decided = len(named) == 1 or (named and data.template)
    layout = named[0] if decided else _layout(read_source(data.train), data)
    template = load_template(data.template, layout, tokenizer)
    row = {layout.main_column: values} if isinstance(values, str) else dict(values)
    for ours, theirs in data.columns.items():
        # A question may be given under our names or the file's, and a template may use either.
        if theirs in row:
            row.setdefault(ours, row[theirs])
        elif ours in row:
            row[theirs] = row[ours]
    return template.render_prompt(layout.read_question(row))


def _layout(source: Source, data: DataConfig) -> Layout:
    for row in source.rows:
        if row.values is not None:
            return find_layout(data, [*row.values, *data.columns], source.name)
    first = source.rows[0]
    raise DataError(f"{source.name}: not one of {len(source.rows)} rows can be read; {first.place}: {first.problem}")


def _tokenized(rendered: Rendered, place: str, data: DataConfig, tokenizer: Any) -> TokenizedRow:
    start, end = rendered.spans[-1]
    prompt, completion = rendered.text[:start], rendered.text[start:end]
    while completion.endswith(tokenizer.eos_token):
        completion = completion.removesuffix(tokenizer.eos_token)
    check_unicode(rendered.text)
    check_answer("what the template makes of the answer", completion)
    input_ids, labels = encode_row(rendered, data.train_on, tokenizer)
    uncut_length = len(input_ids)
    input_ids, labels = input_ids[: data.max_length], labels[: data.max_length]
    check_tokens(input_ids, labels, uncut_length, tokenizer)
    return TokenizedRow(input_ids, labels, place, prompt, completion, uncut_length)


def _report(
    source: Source, layout: Layout, template: Template, data: DataConfig, rows: list[TokenizedRow]
) -> dict[str, Any]:
    lengths = [row.uncut_length for row in rows]
    return {
        "source": source.name,
        "sha256": source.sha256,
        "format": layout.name,
        "template": template.name,
        "train_on": data.train_on,
        "max_length": data.max_length,
        "num_rows": len(rows),
        "num_truncated": sum(length > data.max_length for length in lengths),
        "num_tokens": sum(len(row.input_ids) for row in rows),
        "num_label_tokens": sum(label != IGNORE_INDEX for row in rows for label in row.labels),
        "length": length_summary(lengths),
    }
