"""Unsloth: `FastLanguageModel` in 4 bits, adapters on attention and on the fused experts; its own kernels."""

import argparse
import os
import tempfile

import torch

from benchmarks.peers.driver import Stack, serve
from benchmarks.peers.gpu import ATTENTION, describe, require, require_trained_experts, with_tokenizer

_MAX_TOKENS = 8192


def build(args: argparse.Namespace) -> Stack:
    require(args, "unsloth", "unsloth_zoo")
    stack = build_anywhere(args)
    require_trained_experts(stack.model)
    return stack


def build_anywhere(args: argparse.Namespace) -> Stack:
    """The stack on whatever device Unsloth finds; without a GPU it takes its slow CPU route."""
    # It writes compiled modules beside the caller unless it is told where.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(with_tokenizer(args.model)),
        max_seq_length=_MAX_TOKENS,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing="unsloth",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],  # on fused experts: their parameters
        use_gradient_checkpointing="unsloth",
    )
    return Stack(
        model,
        lambda batch: torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16),
        [
            "dropout 0: fused experts take none",
            "w1 and w3 share one adapter of rank r on fused experts",
            "lm_head has no adapter: asked for one, it would train the whole matrix",
            "its own gradient checkpointing, which keeps activations in host memory",
            *describe(model),
        ],
        ("unsloth", "unsloth_zoo"),
    )


if __name__ == "__main__":
    serve(build)
