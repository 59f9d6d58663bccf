"""What a run would be trained on, shown before it starts: the choices that were made, and examples as tokens.

Which part of an example is trained is read off its labels, not off what a template meant: what is shown is what the
loss is taken on.
"""

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.hub import fetch_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, RunConfig
from expertune.data.examples import IGNORE_INDEX, TokenizedExample, TokenizedExamples
from expertune.data.prepare import prepare_run


def preview_run(config: RunConfig, num_examples: int = 3, trust_remote_code: bool = False) -> dict[str, Any]:
    """What `expertune data` shows. Fetches the tokenizer of the model, and no weights.

    Args:
        config: the run.
        num_examples: how many examples of each source are shown.
        trust_remote_code: run Python that ships with the model's tokenizer.

    Returns:
        `train` and `eval` (None where the run has no evaluation examples), each as `preview` returns it.

    Raises:
        ExpertuneError: what a run would stop at, as far as it concerns data and tokenizer.
    """
    train, evaluation, tokenizer = read_examples(config, trust_remote_code)
    return {
        "train": preview(train, config.data, tokenizer, num_examples),
        "eval": preview(evaluation, config.data, tokenizer, num_examples) if evaluation else None,
    }


def read_examples(
    config: RunConfig, trust_remote_code: bool = False
) -> tuple[TokenizedExamples, TokenizedExamples | None, Any]:
    """The training and the evaluation examples of a run, and the model's tokenizer; see `preview_run`."""
    source = fetch_model(config.model, config.revision, trust_remote_code, weights=False)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    context = context_length(read_config(source.folder, trust_remote_code))
    return *prepare_run(config.data, tokenizer, context=context, objective=config.objective), tokenizer


def preview(tokenized: TokenizedExamples, data: DataConfig, tokenizer: Any, num_examples: int) -> dict[str, Any]:
    """A source's report with what was chosen by whom, and its first examples.

    Args:
        examples: what `prepare_examples` returned.
        data: the data section as the run file has it.
        tokenizer: the tokenizer that made the examples.
        num_examples: how many examples are shown.

    Returns:
        Plain JSON values: the report, `chosen` (`format` and `template`: `named` by the run file or `default`),
        `hints`, and `examples` with `place`, `num_tokens`, `num_trained`, `uncut_length` and `parts`, which are texts
        in order, each with `trained`.
    """
    chosen = {
        "format": "default" if data.format == "auto" else "named",
        "template": "default" if data.template is None else "named",
    }
    return {
        **tokenized.report,
        "chosen": chosen,
        "hints": _hints(tokenized.report, data, tokenizer),
        "examples": [shown_example(example, tokenizer) for example in tokenized.examples[:num_examples]],
    }


def _hints(report: dict[str, Any], data: DataConfig, tokenizer: Any) -> list[str]:
    if (
        data.template is None
        and report["template"] != "chat"
        and report["format"] != "text"
        and tokenizer.chat_template
    ):
        return [
            "the model's tokenizer has a chat template; data.template: chat puts the examples into the form that the "
            "model was tuned with"
        ]
    return []


def shown_example(example: TokenizedExample, tokenizer: Any) -> dict[str, Any]:
    """One example as `preview` has it in `examples`; a pair has its `rejected` side beside it, in the same form."""
    if example.rejected is not None:
        both = dataclasses.replace(example, rejected=None)
        return {**shown_example(both, tokenizer), "rejected": shown_example(example.rejected, tokenizer)}
    told = {"label": example.label, "columns": example.columns}
    flags = [label != IGNORE_INDEX for label in example.labels]
    runs = [(trained, len(list(group))) for trained, group in groupby(flags)]
    texts = _texts(example.input_ids, [length for _, length in runs], tokenizer)
    return {
        "place": example.place,
        "num_tokens": len(flags),
        "num_trained": sum(flags),
        "uncut_length": example.uncut_length,
        "parts": [{"text": text, "trained": trained} for text, (trained, _) in zip(texts, runs, strict=True)],
        **{name: value for name, value in told.items() if value is not None},
    }


def _texts(ids: Sequence[int], lengths: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of consecutive runs of tokens: what each adds to the text before it.

    Decoded alone, a run would lose the space that SentencePiece tokenizers strip from the start of a text.
    """
    texts, before, end = [], "", 0
    for length in lengths:
        start, end = end, end + length
        text = _decode(ids[:end], tokenizer)
        # A run may end amid the bytes of a character, which reads as U+FFFD until the character is whole.
        texts.append(text[len(before) :] if text.startswith(before) else _decode(ids[start:end], tokenizer))
        before = text
    return texts


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
