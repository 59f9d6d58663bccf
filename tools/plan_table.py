"""What large models need on many GPUs, as the page docs/planned-devices.md: planned from configs, nothing measured.

    python tools/plan_table.py [--out docs/planned-devices.md]

The configs are written from transformers' own classes with the published sizes; `PARAMETERS` holds them to the numbers
of parameters that their authors give.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from expertune.config import RunConfig, parse_config
from expertune.gpus import LINKS
from expertune.kernels.amounts import BFLOAT16
from expertune.planning.devices import Machine
from expertune.planning.plan import plan_for
from expertune.planning.reading import read_shapes
from expertune.planning.result import Plan
from expertune.planning.table import short_seconds
from expertune.text import format_size as size

GPUS = {"24 GB": "rtx-4090", "80 GB": "h100"}
DEVICES = (1, 2, 4, 8, 16, 64)
LENGTH, RANK = 4096, 16

QWEN3 = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
# Defaults of transformers' classes are the sizes of Mixtral-8x7B, DeepSeek-V3 and gpt-oss-120b.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": ("mixtral", {}),
    "gpt-oss-120b": ("gpt_oss", {"quantization_config": MXFP4}),
    "Qwen3-235B-A22B": ("qwen3_moe", QWEN3),
    "DeepSeek-V3": ("deepseek_v3", {}),
}
# Billions, as published with the models.
PARAMETERS = {"Mixtral-8x7B": 46.7, "gpt-oss-120b": 116.8, "Qwen3-235B-A22B": 235.1, "DeepSeek-V3": 671.0}

PAGE = """# Large models on many GPUs, as planned

**Planned, not measured.** `python tools/plan_table.py` writes this page with the formulas of the
[plan](guides/plan.md), from configs alone. No run of several GPUs stands behind it.

Each process trains adapters of rank {rank} on attention and all experts, on one example of {length:,} tokens a step.
Activations are checkpointed, and the optimizer has 8-bit states. `distributed.experts: auto` chooses the mode, and
`placement: auto` what is offloaded. 24 GB is an RTX 4090, 80 GB an H100.

- *peak*: memory of the process that needs most, on its GPU. *Experts*: the frozen experts that it holds. *On the host*:
  experts that are offloaded to its host's memory, which the processes of a machine share. The plan does not know how
  much there is.
- *sent*: bytes that a process sends in a step, and how long a link takes for them: at its published rate, as if this
  process had it alone, without latency. NVLink is 450 GB/s in one direction, PCIe 4.0 x16 31.5 GB/s, Ethernet 50 and
  12.5 GB/s. Tokens are counted for uniform routing; models that route by groups of experts send less.
- *parallel a x b*: a times b processes, of which b share the experts out.
- DeepSeek-V3 is published in FP8, which is not read: it is planned from a 16-bit copy.
{tables}
"""


def run_of(folder: Path) -> RunConfig:
    return parse_config(
        {
            "model": str(folder),
            "data": {"train": "rows.jsonl", "max_length": LENGTH},
            "lora": {"r": RANK, "targets": ["attention", "experts"]},
            "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "output_dir": "run",
        }
    )


def write_config(name: str, folder: Path) -> None:
    model_type, values = MODELS[name]
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)


def row(count: int, memory: str, plan: Plan) -> list[str]:
    names = [str(count), memory]
    fits = "fits" if plan.fits else "does not fit"
    if plan.ranks is None:
        held = [size(plan.memory.peak_bytes), size(plan.weights.experts_bytes), size(plan.memory.host_bytes)]
        return [*names, "one process", *held, "", *("" for _ in LINKS), fits]
    mode = plan.ranks.chosen
    sent = [size(mode.traffic.sent_bytes), *(short_seconds(mode.link_seconds(link)) for link in LINKS)]
    held = [size(mode.peak_bytes), size(mode.experts_bytes), size(mode.host_bytes)]
    return [*names, mode.distribution.name, *held, *sent, fits]


def table(name: str, folder: Path) -> Iterator[str]:
    print(name, flush=True)
    write_config(name, folder)
    config = run_of(folder)
    links = [link.short.replace("\n", " ") for link in LINKS]
    head = ["GPUs", "each", "experts held by", "peak", "experts", "on the host", "sent", *links, ""]
    shapes, rows = read_shapes(config, BFLOAT16), []
    for count in DEVICES:
        for memory, gpu in GPUS.items():
            plan = plan_for(config, Machine.of(config, gpu=gpu, devices=count), read=lambda *_: shapes)
            rows.append(row(count, memory, plan))
    billions = plan.parameters.total / 1e9
    assert abs(billions - PARAMETERS[name]) < 0.1, f"{name} has {billions:.1f} billion parameters by its config"
    yield f"\n## {name}\n"
    yield f"{billions:.1f} billion parameters, {plan.parameters.trainable / 1e6:,.0f} million trained.\n"
    yield from (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/planned-devices.md"))
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for name in MODELS for line in table(name, Path(folder) / name)]
    out.write_text(PAGE.format(rank=RANK, length=LENGTH, tables="\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
