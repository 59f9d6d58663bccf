"""Axolotl: its model loader with `quantize_moe_experts`, PEFT's adapters on the fused experts' parameters."""

import argparse
import os
import tempfile
from typing import Any

import torch

from benchmarks.peers.driver import Stack, serve
from benchmarks.peers.gpu import ATTENTION, describe, require, require_trained_experts, with_tokenizer


def build(args: argparse.Namespace) -> Stack:
    require(args, "axolotl", "addict", "triton")
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.loaders import ModelLoader, load_tokenizer

    config = settings(args, "sm_{}{}".format(*torch.cuda.get_device_capability()))
    model, _ = ModelLoader(config, load_tokenizer(config)).load()
    require_trained_experts(model)
    return Stack(
        model,
        lambda batch: torch.autocast("cuda", torch.bfloat16),
        [
            "dropout 0, on every target: it wants none on expert parameters",
            "w1 and w3 share one adapter of rank r on fused experts",
            *describe(model),
        ],
        ("axolotl",),
    )


def settings(args: argparse.Namespace, compute_capability: str) -> Any:
    """Its configuration, checked and completed by Axolotl itself as its command line would."""
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(
        base_model=str(with_tokenizer(args.model)),
        adapter="qlora",
        load_in_4bit=True,
        quantize_moe_experts=True,
        lora_r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        lora_target_modules=[*ATTENTION, "lm_head"],
        lora_target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # What follows decides nothing here, but the settings are refused without it.
        sequence_len=8192,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        num_epochs=1,
        learning_rate=2.5e-5,
        optimizer="adamw_torch",
        lr_scheduler="constant",
        datasets=[{"path": "unused", "type": "alpaca"}],
        output_dir=tempfile.mkdtemp(prefix="axolotl-"),
    )
    device = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 1, "n_node": 1}
    checked = validate_config(
        config,
        capabilities={**device, "compute_capability": compute_capability},
        env_capabilities={"torch_version": torch.__version__.partition("+")[0]},
    )
    normalize_config(checked)
    return checked


if __name__ == "__main__":
    serve(build)
