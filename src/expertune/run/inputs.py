"""What a run reads before a weight is loaded: the base model's identity and tokenizer, and its examples."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from transformers import PreTrainedTokenizerBase

from expertune.adapt.amounts import MOST_PREFLIGHT_TOKENS
from expertune.adapt.attach import expected_layout
from expertune.adapt.base_model import note_other_base, require_same_base
from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, RunConfig
from expertune.data import TokenizedExamples, make_collator, make_dataset, plot_lengths, prepare_run, sequences_of
from expertune.data.preview import preview
from expertune.errors import DataError
from expertune.objectives.rewards import require_answers
from expertune.planning.duration import Lengths
from expertune.report.preview import render_preview
from expertune.run.base_model import has_to_calibrate, identify_base, note_new_calibration
from expertune.run.context import RunContext
from expertune.run.identity import identify, require_same_identity
from expertune.text import counted
from expertune.train.schedule import require_a_batch, require_prompts


@dataclass(frozen=True)
class Inputs:
    """All that a run reads before a weight is loaded.

    Attributes:
        source: where the base model lies.
        fingerprint: what identifies its weights.
        tokenizer: the base model's.
        stock_refusal: why stock PEFT is expected not to read the whole adapter, or None.
        train: the training examples.
        dataset: the same, as the trainer's batches are made of them.
        eval: the evaluation examples, or None.
    """

    source: ModelSource
    fingerprint: Fingerprint
    tokenizer: PreTrainedTokenizerBase
    stock_refusal: str | None
    train: TokenizedExamples
    dataset: Sequence[Mapping[str, Any]]
    eval: TokenizedExamples | None

    def lengths(self, data: DataConfig) -> Lengths:
        """How many examples there are, and how long."""
        return Lengths.of(data, len(self.dataset), self.train.report, self.eval.report if self.eval else None)


def read_inputs(context: RunContext, start: Mapping[str, str] | None) -> Inputs:
    """Read and check everything, record what it is by content, and show it.

    Args:
        context: the run.
        start: what `adapter_digests` gives of the adapter to start from; None without one.

    Raises:
        ExpertuneError: a part is missing or wrong, or is not what a resumed run started with.
    """
    config, trust = context.config, context.trust_remote_code
    source = fetch_model(config.model, config.revision, trust)
    described = build_meta_model(source.folder, torch.bfloat16, trust, shapes_only=True)
    # What follows is asked of all ranks for an NF4 folder, and of none for another.
    context.ranks.require_same({"model folder": is_nf4_folder(source.folder)})
    with context.bars.task("looking at the model's files"):
        base = identify_base(context, source, described)
    if config.lora.init_from and not config.lora.init_from_other_base:
        require_same_base(config.lora.init_from, base, config.model)
    elif config.lora.init_from and (note := note_other_base(config.lora.init_from, base)):
        context.notify(f"lora.init_from: {note}")
    calibrates = has_to_calibrate(context, source)
    expected = expected_layout(described, config.lora)
    note_stock_refusal(context, expected.refusal)
    if expected.merging:
        context.notify(f"adapter: {expected.merging}")
    tokenizer = load_tokenizer(source.folder, trust)
    max_tokens = context_length(read_config(source.folder, trust))
    earlier = context.record.section("data")
    with context.bars.task("tokenizing", "examples") as progress:
        train, evaluation = prepare_run(config.data, tokenizer, earlier, max_tokens, progress, config.objective)
    inputs = Inputs(source, base, tokenizer, expected.refusal, train, make_dataset(train, config.data), evaluation)
    # Before anything is written, so that a mistake leaves no directory behind.
    if config.objective == "grpo":
        require_prompts(len(inputs.dataset), context.arguments)
    for part in (train, evaluation):
        require_answers(config.rewards, part.examples if part else [])
    if calibrates:
        _require_tokens(config, train)
        if note := note_new_calibration(config):
            context.notify(note)
    _record_inputs(context, inputs, start)
    _show_data(context, inputs)
    return inputs


def _require_tokens(config: RunConfig, train: TokenizedExamples) -> None:
    """Refuse training examples that have fewer tokens than the calibration asks for; of a pair the chosen counts."""
    wanted, there = config.quantization.calibration_tokens, 0
    for example in train.examples:
        there += len(example.input_ids)
        if there >= wanted:
            return
    raise DataError(
        f"data.train: {counted(there, 'token')}, and the calibration wants {wanted} of them; give more examples, "
        f"or set quantization.calibration_tokens to at most {there}"
    )


def note_stock_refusal(context: RunContext, refusal: str | None) -> None:
    """Show why stock PEFT will not read the adapter, where it will not."""
    if refusal:
        way = (
            "" if context.config.lora.use_dora else "; for a file that others read too, leave that out of lora.targets"
        )
        context.notify(
            f"adapter: stock PEFT {peft.__version__} will not read all of it: {refusal}. Expertune reads it{way}"
        )


def _record_inputs(context: RunContext, inputs: Inputs, start: Mapping[str, str] | None) -> None:
    """Keep what the run reads by its content; refuse to resume over anything else."""
    config, record = context.config, context.record
    reports = {"train": inputs.train.report, "eval": inputs.eval.report if inputs.eval else None}
    identity = identify(config, inputs.tokenizer, {"train": inputs.train, "eval": inputs.eval}, start)
    require_same_identity(record, config, inputs.fingerprint, identity, reports)
    require_a_batch(len(inputs.dataset), config.training, context.ranks.world_size)
    context.ranks.require_same({"model": inputs.fingerprint.to_json(), "inputs": identity})
    record.values["inputs"] = identity
    record.update("data", **reports)


def _show_data(context: RunContext, inputs: Inputs) -> None:
    data, console = context.config.data, context.console
    lengths = np.concatenate([part.uncut_lengths for part in (inputs.train, inputs.eval) if part])
    if not (context.resume and (context.output_dir / "lengths.png").exists()):  # of the same examples, cut at the same
        context.write_beside("lengths.png", lambda path: plot_lengths(lengths, path, data.max_length))
    for name, part, num_examples in (("train", inputs.train, 1), ("eval", inputs.eval, 0)):
        if part:
            shown = preview(part, data, inputs.tokenizer, num_examples=num_examples)
            console.print(render_preview(name, shown), soft_wrap=False)
    report = inputs.train.report
    context.notify(
        f"data: {counted(report['num_rows'], 'training example')}, {report['num_truncated']} cut at {data.max_length} "
        f"tokens, {report['num_skipped']} skipped; lengths in {context.output_dir / 'lengths.png'}"
    )


def probe_batch(context: RunContext, inputs: Inputs, most_tokens: int) -> dict[str, Any]:
    """The first training examples, as many as the preflight check's tokens allow, collated as in training."""
    # Answers that are compared are sequences like any other, and a prompt alone is all that there is to predict.
    rows = inputs.dataset if "kind" not in inputs.train.report else sequences_of(inputs.train.examples)
    # Of a long example its beginning is enough; whole, it could need more memory than the run itself.
    short = ({key: each if key == "example_ids" else each[:most_tokens] for key, each in row.items()} for row in rows)
    return next(_small_batches(context, inputs, short, most_tokens))


def sample_batches(context: RunContext, inputs: Inputs, most_tokens: int) -> Iterator[dict[str, Any]]:
    """Whole training examples from all over the data, up to so many tokens, in batches as small as they allow.

    They are the same for every seed of a run, and on all ranks.
    """
    rows, is_plain = inputs.train.examples, "kind" not in inputs.train.report
    order = list(range(len(inputs.dataset if is_plain else rows)))
    random.Random(0).shuffle(order)
    drawn = (row for index in order for row in ([inputs.dataset[index]] if is_plain else sequences_of([rows[index]])))
    tokens = 0
    for batch in _small_batches(context, inputs, drawn):
        yield batch
        tokens += batch["input_ids"].numel()
        if tokens >= most_tokens:
            return


def _small_batches(
    context: RunContext, inputs: Inputs, rows: Iterable[Mapping[str, Any]], most_tokens: int = MOST_PREFLIGHT_TOKENS
) -> Iterator[dict[str, Any]]:
    data, collate = context.config.data, make_collator(context.config.data, inputs.tokenizer)

    def collated(rows: list[Any]) -> dict[str, Any]:
        batch = collate(rows)
        return {key: value.to(context.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}

    chosen: list[Any] = []
    tokens = 0
    for row in rows:
        length = data.max_length if data.packing == "padded" else len(row["input_ids"])
        if chosen and tokens + length > most_tokens:
            yield collated(chosen)
            chosen, tokens = [], 0
        chosen.append(row)
        tokens += length
    yield collated(chosen)
