"""A first run file for a model and a file of examples: each choice that was made, with its reason beside it."""

import glob
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.hub import fetch_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, RunConfig, apply_overrides, parse_config
from expertune.data import TokenizedExamples, prepare_examples
from expertune.data.pairs import leak_warning, with_leak_told
from expertune.data.preview import preview
from expertune.kernels.amounts import Dtype
from expertune.planning.devices import Machine
from expertune.planning.duration import Lengths
from expertune.planning.plan import plan_for
from expertune.planning.result import Plan
from expertune.planning.shapes import Shapes
from expertune.text import counted, format_size, printable
from expertune.train.schedule import count_steps

_WIDTH = 100

# Tokens of an example up to which nothing is cut; longer ones are rare in instruction data, and set the memory of all.
_LONGEST = 2048
_MULTIPLE = 64

# One in ten examples is held out, up to so many; of fewer than this none is.
_MOST_HELD_OUT, _FEWEST_TO_SPLIT = 200, 20

_EXAMPLES_A_STEP = 16

# Epochs of fewer examples than this.
_EPOCHS = ((2_000, 3), (20_000, 2))

_REASONS = {
    "lora.r": "The adapter's rank. 16 suits most tasks; more learns more, and takes more memory.",
    "lora.alpha": "alpha / r scales the update; twice the rank is customary.",
    "training.per_device_train_batch_size": "One example at a time is the least memory. The plan runs as many of a "
    "step's examples at once as memory allows.",
    "training.learning_rate": "The rate of the QLoRA paper for models of up to 13B weights (Dettmers et al. 2023; 1e-4 "
    "for larger ones). transformers' own default, 5e-5, moves an adapter that starts at zero very little.",
    "training.lr_scheduler_type": "The rate falls to zero, so that the last steps settle.",
    "training.gradient_checkpointing": "Layers are computed again in backward, all but their experts: far less memory.",
    "training.load_best_model_at_end": "The adapter of the lowest evaluation loss, which is not always the last.",
    "training.save_total_limit": "The best checkpoint and the last.",
}


@dataclass(frozen=True)
class Draft:
    """A run file that has not been written.

    Attributes:
        text: the file.
        preview: the examples as they will be trained on, with the first one (`expertune.report.preview` shows it).
        plan: what the run needs on this machine.
        before: a command that has to be run once, for the run to fit here; None where it fits.
        note: what of the examples their owner may not have meant; None where nothing was found.
    """

    text: str
    preview: Mapping[str, Any]
    plan: Plan
    before: str | None
    note: str | None = None


def draft_run_file(
    model: str,
    data: str,
    out: Path,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    read: Callable[[RunConfig, Dtype, bool], Shapes] | None = None,
) -> Draft:
    """Choose a run's settings by its examples and this machine.

    Args:
        model: folder or hub id.
        data: examples, as `data.train` names them.
        out: the file that is to be written, for the commands in it.
        overrides: `section.key=value` strings that stand above every choice, e.g. of `data.columns`.
        trust_remote_code: run Python that ships with the model.
        read: see `expertune.planning.plan.plan_for`.

    Raises:
        ExpertuneError: what a run would stop at: the model, the examples or an override.
    """
    source = fetch_model(model, None, trust_remote_code, weights=False)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    context = context_length(read_config(source.folder, trust_remote_code))
    asked: dict[str, Any] = {}
    set_by = apply_overrides(asked, overrides)
    if any(each.partition("=")[0].strip() == "data.eval" for each in overrides):
        asked.setdefault("data", {}).setdefault("eval", None)  # null, which removes a key of a file, is an answer here
    whole = {"model": model, "data": {"train": data, "max_length": context or 2**17}, "output_dir": _run_dir(data)}
    values = _above(asked, whole)
    examples = prepare_examples(_data_of(values, set_by), "train", tokenizer)
    reasons = dict(_REASONS)
    has_turns = examples.report["format"] != "text"
    if "template" not in asked.get("data", {}) and has_turns and tokenizer.chat_template:
        values["data"]["template"] = "chat"
        reasons["data.template"] = "The model's own chat template, in which it was tuned."
        examples = prepare_examples(_data_of(values, set_by), "train", tokenizer)
    else:
        values["data"].setdefault("template", examples.report["template"])
        reasons["data.template"] = f"Chosen for the layout {examples.report['format']}."
    held_out = _held_out(data, examples, asked.get("data", {}))
    values = _above(asked, _choices(values, held_out, examples, reasons, context))
    config = parse_config(values, "init", overrides=set_by)
    evaluated, leak = None, ""
    if config.data.eval and not held_out:
        # As long as the training examples are here, whose repeats are looked for.
        as_long = config.data.model_copy(update={"max_length": examples.report["max_length"]})
        evaluated = prepare_examples(as_long, "eval", tokenizer)
        trained, tried = examples, evaluated
        if config.objective != "sft":  # of which a repeat is one of the prompt
            trained, tried = (
                prepare_examples(as_long, part, tokenizer, objective=config.objective) for part in ("train", "eval")
            )
        leak = leak_warning(with_leak_told(trained, tried).report)
    lengths = _lengths(config, examples, held_out, evaluated)
    plan = plan_for(config, Machine.of(config), None, trust_remote_code, read).timed(lengths)
    before = next((change.first for change in plan.what_to_change if change.first), None)
    if not plan.fits and not before and plan.smallest_peak_bytes <= plan.budget_bytes:
        for change in plan.what_to_change:
            apply_overrides(values, change.lines)
            reasons |= dict.fromkeys(change.settings, f"So that the run fits on this machine: {change.costs}.")
        config = parse_config(values, "init", overrides=set_by)
        plan = plan_for(config, Machine.of(config), None, trust_remote_code, read).timed(lengths)
    reasons["placement"] = _placement(plan)
    for key in _dotted(asked):
        reasons[key] = "As given."
    if "train" in asked.get("data", {}) and not config.data.eval:
        reasons["data.train"] = "As given. Nothing is held out of it; name examples to evaluate on as data.eval."
    if leak:
        reasons["data.eval"] += f" Note: {leak}."
    shown = preview(examples, config.data, tokenizer, num_examples=1)
    text = _written(values, reasons, _heading(plan, before, shlex.quote(str(out))))
    return Draft(text, shown, plan, before, f"data.eval: {leak}" if leak else None)


def _choices(
    values: dict[str, Any], held_out: int, examples: TokenizedExamples, reasons: dict[str, str], context: int | None
) -> dict[str, Any]:
    """Every section of the run file; why is added to `reasons`."""
    total = sum(examples.report["files"].values())
    section, data = dict(values["data"]), values["data"]["train"]
    if held_out:
        section["train"], section["eval"] = f"{data}[0:{total - held_out}]", f"{data}[{total - held_out}:{total}]"
        reasons["data.eval"] = (
            f"The last {held_out} of {total:,} examples are held out. If the file is sorted, shuffle it first, or name "
            "another file."
        )
    num_rows = total - held_out
    section["max_length"], reasons["data.max_length"] = _max_length(examples, context)
    section = {key: section.pop(key) for key in ("train", "eval") if key in section} | section
    reasons["data.train"] = f"Layout: {examples.report['format']}."
    accumulation = min(_EXAMPLES_A_STEP, max(num_rows // 4, 1))
    epochs = next((epochs for count, epochs in _EPOCHS if num_rows < count), 1)
    training: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
    }
    steps = count_steps(training, num_rows) or 1
    reasons["training.gradient_accumulation_steps"] = f"{counted(accumulation, 'example')} a step."
    reasons["training.num_train_epochs"] = (
        f"{counted(steps, 'step')}. Small data is seen more often: 3 epochs below 2,000 examples, 2 below "
        "20,000, else 1."
    )
    every = max(steps // 4, 1)
    training |= {
        "learning_rate": 2.0e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(round(0.03 * steps), 1),
        "gradient_checkpointing": True,
        "logging_steps": min(max(steps // 50, 1), 10),
    }
    if section.get("eval"):
        training |= {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": every}
        reasons["training.eval_on_start"] = "The loss that every later one is compared with."
    training |= {"save_steps": every, "save_total_limit": 2}
    if section.get("eval"):
        training["load_best_model_at_end"] = True
    reasons["training.warmup_steps"] = "The first 3 % of the steps."
    return {
        "model": values["model"],
        "data": section,
        "lora": {"r": 16, "alpha": 32},
        "training": training,
        "placement": "auto",
        "output_dir": values["output_dir"],
    }


def _data_of(values: Mapping[str, Any], set_by: Mapping[str, str]) -> DataConfig:
    """The data section of a run file in which nothing is held out yet: what needs evaluation examples is no error."""
    data = {"eval": values["data"]["train"]} | values["data"]
    return parse_config({**values, "data": data}, "init", overrides=set_by).data


def _max_length(examples: TokenizedExamples, context: int | None) -> tuple[int, str]:
    lengths = examples.uncut_lengths
    longest, most = int(max(lengths)), min(_LONGEST, context or _LONGEST)
    if longest <= most:
        chosen = min(-(-longest // _MULTIPLE) * _MULTIPLE, context or longest + _MULTIPLE)
        return chosen, f"The longest example has {longest:,} tokens, so that none is cut."
    cut = sum(int(length) > most for length in lengths)
    return most, f"{cut:,} of {len(lengths):,} examples are longer, up to {longest:,} tokens, and are cut."


def _held_out(data: str, examples: TokenizedExamples, asked: Mapping[str, Any]) -> int:
    """How many of the last examples are for evaluation; none where the run's examples were named by overrides."""
    total = sum(examples.report["files"].values())
    if total < _FEWEST_TO_SPLIT or not _can_be_cut(data) or "train" in asked or "eval" in asked:
        return 0
    return min(max(total // 10, 1), _MOST_HELD_OUT)


def _lengths(
    config: RunConfig, examples: TokenizedExamples, held_out: int, evaluated: TokenizedExamples | None
) -> Lengths:
    """Those of the run; examples that are held out are as long as the others."""
    total, num_tokens = len(examples.uncut_lengths), _mean(config, examples)
    if evaluated is None:
        return Lengths(max(total - held_out, 1), num_tokens, held_out, num_tokens)
    return Lengths(total, num_tokens, len(evaluated.uncut_lengths), _mean(config, evaluated))


def _mean(config: RunConfig, examples: TokenizedExamples) -> float:
    lengths = examples.uncut_lengths
    return sum(min(int(length), config.data.max_length) for length in lengths) / len(lengths)


def _can_be_cut(data: str) -> bool:
    """Whether slices can be written behind a source: it is one file or dataset, and has none."""
    return not data.endswith("]") and glob.escape(data) == data


def _run_dir(data: str) -> str:
    name = Path(data.partition("[")[0].rstrip("/")).name.partition(".")[0]
    return f"runs/{''.join(char if char.isalnum() or char in '-_' else '-' for char in name).strip('-') or 'first'}"


def _placement(plan: Plan) -> str:
    what = plan.planned.reason or "all experts lie in its memory"
    return f"On this machine ({plan.gpu or plan.device}): {what}."


def _heading(plan: Plan, before: str | None, out: str) -> list[str]:
    peak, budget = format_size(plan.memory.peak_bytes), format_size(plan.budget_bytes)
    # Commands are not wrapped, so that they can be copied.
    lines = [f"What it costs:  expertune plan {out}", f"The run:        expertune train {out}"]
    if plan.fits:
        planned = f"Planned here: a peak of {peak} of {budget}" + (f"; {plan.run_time.line}" if plan.run_time else "")
        lines += textwrap.wrap(planned, _WIDTH)
    else:
        lines.append(f"It does not fit on this machine: its peak is {peak}, of {budget}.")
    if before:
        lines += [f"It does once `{before}` has run, with:", *plan.yaml.splitlines()]
    return lines


def _written(values: Mapping[str, Any], reasons: Mapping[str, str], heading: Sequence[str]) -> str:
    """A run file with a comment above each key that has a reason."""
    lines = [f"# {printable(line, kept='')}" for line in heading]
    for key, value in values.items():
        lines.append("")
        if isinstance(value, Mapping):
            lines.append(f"{key}:")
            for name, inner in value.items():
                lines += [*_comment(reasons.get(f"{key}.{name}"), "  "), f"  {name}: {_flow(inner)}"]
        else:
            lines += [*_comment(reasons.get(key), ""), f"{key}: {_flow(value)}"]
    return "\n".join(lines) + "\n"


def _comment(reason: str | None, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(reason or "", _WIDTH)]


def _flow(value: Any) -> str:
    """A value on one line, as YAML has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _above(asked: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with what was asked for above them."""
    found = dict(values)
    for key, value in asked.items():
        inside = found.get(key)
        found[key] = _above(value, inside) if isinstance(value, Mapping) and isinstance(inside, Mapping) else value
    return found


def _dotted(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}.{name}" if isinstance(value, Mapping) else key
        for key, value in values.items()
        for name in (value if isinstance(value, Mapping) else [""])
    ]
