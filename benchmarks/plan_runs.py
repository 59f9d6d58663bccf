"""The runs that the plan is compared with: a model of random weights each, real text, and a run file.

The last six were chosen after the plan's formulas were last changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOLLY_SAMPLE = Path(__file__).resolve().parent / "data" / "dolly-first64.jsonl"
QUESTIONS = "questions.jsonl"

_STEPS = 2
_ROWS = 64
_LATENT = {
    "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One run: a family's config at some size, and what its run file says.

    Attributes:
        family: transformers' `model_type`.
        model: keys of the config.
        run: sections of the run file.
        nf4_folder: the run starts from a folder that `expertune quantize` wrote.
    """

    family: str
    model: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    nf4_folder: bool = False


def _run(
    length: int, batch: int, checkpointing: bool, evaluation_batch: int = 0, accumulation: int = 1, **top: Any
) -> dict[str, Any]:
    """Sections of a run file; `packing` goes into `data`, and `accumulation` runs as it is written."""
    data: dict[str, Any] = {"max_length": length, "train_on": "all", "format": "text", "merge_accumulation": False}
    if "packing" in top:
        data["packing"] = top.pop("packing")
    training: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": checkpointing,
        "gradient_accumulation_steps": accumulation,
    }
    if evaluation_batch:
        data["eval"] = True
        training |= {"per_device_eval_batch_size": evaluation_batch, "eval_strategy": "steps", "eval_steps": 1}
    return {"data": data, "training": training, "lora": {}, **top}


SHAPES = {
    "mixtral, checkpointed": Shape(
        "mixtral",
        {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 3, "num_local_experts": 8},
        _run(1024, 2, True, lora={"dropout": 0.05, "targets": ["attention", "experts", "lm_head"]}),
    ),
    "mixtral, all activations": Shape(
        "mixtral",
        {"hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": 6, "num_local_experts": 4},
        _run(1024, 3, False),
    ),
    "qwen3, many experts, evaluation": Shape(
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 768, "num_hidden_layers": 3,
            "num_experts": 64, "num_experts_per_tok": 4, "head_dim": 128, "vocab_size": 64000,
        },
        _run(256, 4, True, evaluation_batch=4, lora={"r": 16}),
    ),
    "qwen3, dropout, all activations": Shape(
        "qwen3_moe",
        {
            "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 6,
            "num_experts": 32, "num_experts_per_tok": 4, "head_dim": 64,
        },
        _run(512, 4, False, lora={"dropout": 0.1}),
    ),
    "olmoe, all logits": Shape(
        "olmoe",
        {
            "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2, "num_experts": 64,
            "num_experts_per_tok": 4,
        },
        _run(512, 6, True, loss="full"),
    ),
    "deepseek, latent attention": Shape(
        "deepseek_v3",
        {
            **_LATENT, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 768,
            "num_hidden_layers": 5,
        },
        _run(1024, 2, False, lora={"dropout": 0.05}),
    ),
    "granite, a large adapter": Shape(
        "granitemoe",
        {
            "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 3, "num_local_experts": 32,
            "num_experts_per_tok": 4, "tie_word_embeddings": True,
        },
        _run(256, 1, True, lora={"r": 64}),
    ),
    "mixtral, evaluation with all logits": Shape(
        "mixtral",
        {"hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": 2, "num_local_experts": 8},
        _run(256, 2, True, evaluation_batch=16, loss="full"),
    ),
    "mixtral, float32": Shape(
        "mixtral",
        {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 4, "num_local_experts": 8},
        _run(1024, 1, False, quantization={"compute_dtype": "float32"}),
    ),
    "mixtral, experts on disk": Shape(
        "mixtral",
        {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 6, "num_local_experts": 16},
        _run(512, 1, True, loss="full", placement="disk"),
        nf4_folder=True,
    ),
    "qwen2, a long row": Shape(
        "qwen2_moe",
        {
            "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 704,
            "shared_expert_intermediate_size": 2816, "num_hidden_layers": 3, "num_experts": 16,
            "num_experts_per_tok": 4,
        },
        _run(4096, 1, True),
    ),
    "qwen3, answers": Shape(
        "qwen3_moe",
        {
            "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 6,
            "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 128, "num_key_value_heads": 16,
        },
        _run(512, 1, True, evaluation_batch=1, task={"metric": "exact-match", "batch_size": 16, "max_new_tokens": 16}),
    ),
    "deepseek-v2, on disk, dropout": Shape(
        "deepseek_v2",
        {
            **_LATENT, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 1024,
            "num_hidden_layers": 4,
        },
        _run(640, 1, False, lora={"dropout": 0.1}, placement="disk"),
        nf4_folder=True,
    ),
    "qwen3, packed, a rank of 32": Shape(
        "qwen3_moe",
        {
            "hidden_size": 768, "intermediate_size": 1536, "moe_intermediate_size": 384, "num_hidden_layers": 4,
            "num_experts": 24, "num_experts_per_tok": 3, "head_dim": 64,
        },
        _run(768, 2, False, lora={"r": 32}, packing="packed"),
    ),
    "granite, small": Shape(
        "granitemoe",
        {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_local_experts": 8},
        _run(128, 1, False),
    ),
    "gpt-oss, experts alone": Shape(
        "gpt_oss",
        {
            "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 3, "num_local_experts": 16,
            "num_experts_per_tok": 4, "head_dim": 64,
        },
        _run(384, 3, True, lora={"targets": ["experts"]}, packing="padded"),
    ),
    "mixtral, padded, two micro-batches": Shape(
        "mixtral",
        {"hidden_size": 1536, "intermediate_size": 3072, "num_hidden_layers": 3, "num_local_experts": 6},
        _run(320, 2, True, lora={"targets": ["attention", "experts", "router"]}, packing="padded", accumulation=2),
    ),
    "olmoe, on disk": Shape(
        "olmoe",
        {
            "hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 4, "num_experts": 32,
            "num_experts_per_tok": 4,
        },
        _run(384, 2, True, lora={"r": 16, "targets": ["attention", "experts", "lm_head"]}, placement="disk"),
        nf4_folder=True,
    ),
    "phimoe, an adapter in bfloat16, evaluation": Shape(
        "phimoe",
        {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_local_experts": 8},
        _run(512, 2, False, evaluation_batch=2, lora={"r": 16, "dtype": "bfloat16"}),
    ),
    "deepseek-v3, padded, accumulating": Shape(
        "deepseek_v3",
        {
            **_LATENT, "hidden_size": 768, "intermediate_size": 1536, "moe_intermediate_size": 512,
            "num_hidden_layers": 3,
        },
        _run(256, 3, True, lora={"r": 16}, packing="padded", accumulation=2),
    ),
    "mixtral, packed, a rank of 64": Shape(
        "mixtral",
        {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 3, "num_local_experts": 6},
        _run(640, 2, False, lora={"r": 64, "dropout": 0.05}, packing="packed"),
    ),
}  # fmt: skip

_COMMON = {
    "vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_model(folder: Path, shape: Shape) -> None:
    """A random model under the names of published checkpoints, and a tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from benchmarks.workload import write_tokenizer

    config = AutoConfig.for_model(shape.family, **(_COMMON | dict(shape.model)))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    numbers = torch.randn(2**20 + 7).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), numbers.numel()):
                part = flat[start : start + numbers.numel()]
                part.copy_(numbers[: part.numel()])
        for buffer in model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.zero_()
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_rows(path: Path, num_rows: int = _ROWS) -> None:
    """Rows of more tokens than any `max_length` here, of real text."""
    rows = [json.loads(line) for line in DOLLY_SAMPLE.read_text(encoding="utf-8").splitlines()]
    text = "\n".join(f"{row['instruction']} {row['context']} {row['response']}" for row in rows)
    length = 30_000  # characters
    text *= 2 + length // len(text)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            start = number * 997 % (len(text) - length)
            file.write(json.dumps({"text": text[start : start + length]}) + "\n")


def write_questions(folder: Path, rows: Path, length: int) -> None:
    """The rows cut in two, beside the model: prompts nearly as long as a row may be, of different length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (folder / QUESTIONS).open("w", encoding="utf-8") as file:
        for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines()):
            text = json.loads(line)["text"]
            # A few tokens more come before it and where it is cut.
            offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
            end = offsets[length - 8 - number % 4][0]
            file.write(json.dumps({"prompt": text[:end], "completion": text[end:]}) + "\n")


def run_file(shape: Shape, folder: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """The run file as a mapping."""
    data = dict(shape.run["data"])
    evaluated = shape.run["training"].get("per_device_eval_batch_size", 0)
    if "task" in shape.run:
        rows, evaluated = folder / QUESTIONS, shape.run["task"]["batch_size"]
        # As they were cut: headings would make them longer than a row may be.
        data |= {"format": "prompt-completion", "template": "plain"}
    data["train"] = f"{rows}[0:{_ROWS // 2}]"
    if "eval" in data:
        data["eval"] = f"{rows}[{_ROWS // 2}:{_ROWS // 2 + evaluated}]"
    training = {**shape.run["training"], "max_steps": _STEPS, "logging_steps": 1, "save_strategy": "no"}
    # Not `auto`: what that takes on a CPU is the machine's.
    quantization = {"compute_dtype": "bfloat16", **shape.run.get("quantization", {})}
    return {
        **shape.run,
        "model": str(folder),
        "data": data,
        "training": training,
        "quantization": quantization,
        "output_dir": str(output_dir),
    }
