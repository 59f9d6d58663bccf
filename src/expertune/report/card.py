"""The README.md of an adapter or an export: a model card as the Hugging Face hub reads it.

A card is made to be shown to others. So it has figures, settings and names of the hub, and no path of a machine, name
of a local file, text of an example, or value that is for the user alone, such as a run's name. The license is left to
the user.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertune.config import RunConfig
from expertune.data.hub import is_hub_name
from expertune.data.readers import reader_of
from expertune.data.template import is_own_file, shipped_template
from expertune.evaluation.metrics import shown_figures
from expertune.evaluation.objective_figures import OBJECTIVES
from expertune.report.markdown import figure, how_many, plain, table, titled, with_error, words
from expertune.report.objective import held_out_figures
from expertune.report.values import section, selected_experts
from expertune.report.verified import verified

CARD_NAME = "README.md"

MARK = "<!-- Expertune writes this file again with new scores; remove this line to keep your own words. -->"

# Settings of `training:` that say how a model came about, and hold nothing private.
_TRAINING = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "optim"),
    *("weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("neftune_noise_alpha", "bf16", "fp16", "load_best_model_at_end"),
    # Of TRL's objectives.
    *("beta", "loss_type", "label_smoothing", "desirable_weight", "undesirable_weight", "num_generations"),
    *("max_completion_length", "temperature", "scale_rewards"),
)

_LIBRARIES = {"gguf": "gguf", "gguf-adapter": "gguf", "mlx": "mlx", "mlx-merged": "mlx", "merged": "transformers"}
_WHOLE_MODELS = frozenset({"merged", "gguf", "mlx-merged"})


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        record: the run record's values.
        config: the run file.
        base: `base_model_name_or_path` of the adapter.
        revision: the commit of a base from the hub; None where the base was a folder.
        adapter: `adapter`, or `checkpoint-N`.
        form: the format of an export; None for the adapter in a run directory.
        verification: content of its `verification.json`.
        where: what its users call it: its name on the hub.
        rank: of an exported adapter, which may be filled up; None means the run's.
    """

    record: Mapping[str, Any]
    config: RunConfig
    base: str
    revision: str | None
    adapter: str = "adapter"
    form: str | None = None
    verification: Mapping[str, Any] | None = None
    where: str = "THIS-FOLDER"
    rank: int | None = None

    @property
    def base_id(self) -> str | None:
        """The base's name on the hub; None where it was a folder, whose path is nobody's business."""
        return self.base if self.revision else None

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "model with a LoRA adapter merged into it" if self.form in _WHOLE_MODELS else "LoRA adapter"

    @property
    def is_final(self) -> bool:
        """Whether the run's last scores are those of this adapter."""
        return self.adapter == "adapter"


def render_card(subject: Subject) -> str:
    """The whole text: metadata between two lines of dashes, then Markdown."""
    metadata = yaml.safe_dump(_metadata(subject), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{metadata}---",
        MARK,
        f"# {_title(subject)}",
        *_warning(subject),
        _introduction(subject),
        *titled("Scores", _scores(subject)),
        *titled("Scores by lm-evaluation-harness", _harness(subject)),
        *titled("Recipe", table(("", ""), _recipe(subject))),
        *titled("Verified", verified(subject.verification or {})),
        *titled("Use", _use(subject)),
        *titled("Prompt", _prompt(subject)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(subject: Subject) -> dict[str, Any]:
    whole = subject.form in _WHOLE_MODELS
    found: dict[str, Any] = {}
    if subject.base_id:
        found["base_model"] = subject.base_id
        found["base_model_relation"] = "finetune" if whole else "adapter"
    if datasets := _hub_datasets(subject):
        found["datasets"] = datasets
    found["library_name"] = _LIBRARIES.get(subject.form or "", "peft")
    found["pipeline_tag"] = "text-generation"
    found["tags"] = ["expertune", "lora", "qlora", "mixture-of-experts", "transformers"]
    if subject.config.objective != "sft":
        found["tags"] += ["trl", subject.config.objective]
    return found


def _hub_datasets(subject: Subject) -> list[str]:
    """Ids of the datasets of the hub that it was trained on; local files are called nothing here."""
    report = (subject.record.get("data") or {}).get("train") or {}
    names = [str(name) for name in report.get("sha256", {})]
    return sorted({name.split(":")[0] for name in names if is_hub_name(name) and reader_of(Path(name)) is None})


def _title(subject: Subject) -> str:
    name = subject.base_id.split("/")[-1] if subject.base_id else _model_type(subject)
    return f"{plain(name)}: a {subject.kind}"


def _model_type(subject: Subject) -> str:
    base = (subject.record.get("model") or {}).get("base") or {}
    config = base.get("config") if isinstance(base, Mapping) else None
    return str((config or {}).get("model_type") or "mixture of experts")


def _introduction(subject: Subject) -> str:
    if subject.base_id:
        base = f"[{plain(subject.base_id)}](https://huggingface.co/{plain(subject.base_id)})"
        base += f" (commit `{plain(str(subject.revision))[:12]}`)"
    else:
        base = (
            f"a {plain(_model_type(subject))} model in a local folder (set `base_model` above to its name on the hub)"
        )
    version = plain(str((subject.record.get("versions") or {}).get("expertune", "")))
    which = "" if subject.is_final else f" This is its state at {plain(subject.adapter)}."
    return (
        f"A {subject.kind}. Base: {base}. It was trained with Expertune {version}, with the experts of the base frozen "
        f"in 4 bits{_objective(subject)}.{which}"
    )


def _warning(subject: Subject) -> list[str]:
    """What comes first of an adapter that is wrong on a 16-bit base."""
    if subject.form or not (init := section(subject.record, "adapter", "init")):
        return []
    return [
        f"> **For the 4-bit base alone.** This adapter began as a correction of what 4 bits lost (`lora.init: "
        f"{plain(str(init.get('how')))}`). On 16-bit weights (stock PEFT, vLLM and others) it would correct an error "
        "that is not there. `expertune export` of its run makes an adapter for these."
    ]


def _objective(subject: Subject) -> str:
    """What it was tuned with, where that is not the cross entropy of answers."""
    objective = subject.config.objective
    if objective == "sft":
        return ""
    of = {"kto": "answers labeled as good or bad", "grpo": "rewards of answers that it wrote"}
    return f", by {OBJECTIVES[objective]} on {of.get(objective, 'pairs of a chosen and a rejected answer')}"


def _scores(subject: Subject) -> str:
    record, rows = subject.record, list[tuple[str, ...]]()
    task = record.get("task") or {}
    before, after = task.get("before") or {}, (task.get("after") or {}) if subject.is_final else {}
    for each in shown_figures(after):
        count = f"{each.label} on {after.get('rows')} held-out examples"
        rows.append((count, figure(before.get(each.name)), figure(after.get(each.name))))
    for found in held_out_figures(record) if subject.is_final else ():
        rows.append((f"{found.figure.label} on held-out examples", figure(found.base), figure(found.after)))
    evaluation = record.get("eval") or {}
    loss = evaluation.get("after")
    if not subject.is_final:
        losses = {f"checkpoint-{int(step)}": value for step, value in evaluation.get("loss") or ()}
        loss = losses.get(subject.adapter)
    if loss is not None:
        rows.append(("loss on held-out examples", figure(evaluation.get("before")), figure(loss)))
    shown = table(("", "4-bit base", "4-bit base and adapter"), rows)
    if shown and subject.form:
        return f"{shown}\n\nThey are of the run: of the adapter on the 4-bit base that it was trained on."
    return shown


def _harness(subject: Subject) -> str:
    rows = list[tuple[str, ...]]()
    for name, scores in sorted((subject.record.get("tasks") or {}).items()):
        own, base = scores.get(subject.adapter), scores.get("none") or {}
        for name_of, values in (own or {}).get("figures", {}).items():
            of_base = base.get("figures", {}).get(name_of) or {}
            counts = (how_many(own.get(f"{each}s") or 0, each) for each in ("shot", "example"))
            rows.append((", ".join([f"{name}: {name_of}", *counts]), with_error(of_base), with_error(values)))
    return table(("", "4-bit base", "4-bit base and adapter"), rows)


_EXPERT_RANKS = {
    "scaled": "divided by the number of experts per token",
    "load": "twice for the busiest quarter of a layer's experts, half for the idlest half",
}


def _recipe(subject: Subject) -> Iterator[tuple[str, str]]:
    config, record = subject.config, subject.record
    if config.objective != "sft":
        yield "objective", OBJECTIVES[config.objective]
    lora, quantization = config.lora, config.quantization
    init, trained, lora = lora.init, lora, lora.in_files
    scale = f"alpha {lora.alpha:g}{', rank-stabilized' if lora.rslora else ''}{', DoRA' if lora.use_dora else ''}"
    yield "adapter", f"rank {lora.r}, {scale}, dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
    if init == "pissa":
        began = f"principal components (pissa), trained with rank {trained.r} and alpha {trained.alpha:g}"
        yield "first factors", f"{began}; they are taken away in the files, which doubles the rank"
    for name, pattern in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        if pattern:
            yield f"{name} by projection", ", ".join(f"{key}: {value:g}" for key, value in pattern.items())
    if selection := section(record, "adapter", "selection"):
        yield "experts", " ".join(selected_experts(selection))
    if lora.expert_rank:
        yield "rank of experts", _EXPERT_RANKS[lora.expert_rank]
    double = " with double quantization" if quantization.double_quantization else ""
    yield "frozen weights", f"NF4{double}, blocks of {quantization.block_size}"
    if quantization.layers:
        yield "bits of linears", ", ".join(f"{key}: {bits}" for key, bits in quantization.layers.items())
    report = (record.get("data") or {}).get("train") or {}
    if "num_rows" in report:
        tokens = f", {report['num_tokens']:,} tokens" if isinstance(report.get("num_tokens"), int) else ""
        yield "examples", f"{report['num_rows']:,}{tokens}, trained on: {report.get('train_on', 'completion')}"
    if "template" in report:
        yield "template", "a template of its own" if is_own_file(report["template"]) else str(report["template"])
    yield "longest example", f"{config.data.max_length} tokens"
    yield from ((name, str(config.training[name])) for name in _TRAINING if name in config.training)
    train = record.get("train") or {}
    if subject.is_final and train.get("steps"):
        yield "steps", str(train["steps"])
    if losses := train.get("loss"):
        (first, loss), (last, final) = losses[0], losses[-1]
        yield "training loss", f"{figure(loss)} at step {first}, {figure(final)} at step {last}"
    versions = record.get("versions") or {}
    yield (
        "versions",
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions),
    )


def _use(subject: Subject) -> str:
    base = plain(subject.base_id or "BASE")
    if _warning(subject):
        return (
            "`expertune.open_run` opens its run with the base in the same 4 bits; `expertune export` is for all others."
        )
    text = _USE.get(subject.form or "peft", "").format(
        base=base, rank=subject.rank or subject.config.lora.in_files.r, where=subject.where
    )
    return "\n\n".join([text, *(words(str(note)) for note in (subject.verification or {}).get("notes") or ())])


def _prompt(subject: Subject) -> str:
    report = (subject.record.get("data") or {}).get("train") or {}
    name = report.get("template")
    if name == "chat":
        return "Conversations, by the tokenizer's own chat template."
    text = shipped_template(name) if isinstance(name, str) else None
    if text is None:
        return "A template of the user's own. Where it is a chat template, the tokenizer beside this file has it."
    return f"The template `{plain(str(name))}`, in Jinja:\n\n```\n{text.rstrip()}\n```"


_PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{where}").eval()
```

With Expertune the base stays in 4 bits: `expertune.load_adapter` puts this folder on `expertune.load_model("{base}")`.
For vLLM, llama.cpp, Ollama or mlx-lm, export the run: `expertune export --help`."""

_MERGED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{where}")
model = AutoModelForCausalLM.from_pretrained("{where}", dtype="auto", device_map="auto")
```

It is a model like any other: `vllm serve {where}`."""

_USE = {
    "peft": _PEFT,
    "peft-fused": _PEFT,
    "merged": _MERGED,
    "vllm": "```\nvllm serve {base} --enable-lora --lora-modules mine={where} --max-lora-rank {rank}\n```",
    "gguf-adapter": "```\nllama-server --model BASE.gguf --lora adapter.gguf\n```",
    "gguf": "```\nllama-server --model MODEL.gguf\n```",
    "mlx": '```\nmlx_lm.generate --model {base} --adapter-path {where} --prompt "..."\n```',
    "mlx-merged": '```\nmlx_lm.generate --model {where} --prompt "..."\n```',
}
