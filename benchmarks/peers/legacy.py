"""The tutorial's own stack: transformers 4.57, peft 0.18, one bitsandbytes `Linear4bit` per matrix of each expert."""

import argparse

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.driver import Stack, autocast, serve


def build(args: argparse.Namespace) -> Stack:
    if not transformers.__version__.startswith("4.57.") or not peft.__version__.startswith("0.18."):
        raise SystemExit(
            f"transformers 4.57 and peft 0.18 are wanted, not {transformers.__version__}, {peft.__version__}"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
        llm_int8_skip_modules=["lm_head", "gate"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=getattr(torch, args.dtype), device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = PeftConfig.from_pretrained(args.adapter)
    config.lora_dropout = args.dropout
    model = PeftModel.from_pretrained(model, args.adapter, config=config, is_trainable=True)
    if args.pad_to is not None:
        return _stack(
            model,
            args.dtype,
            f"legacy, fed as in the tutorial: row by row, padded left to {args.pad_to}; real tokens count",
        )
    return _stack(
        model,
        args.dtype,
        "router kept in 16 bits, as ours, so that both stacks hold the same weights; by itself it would be 4-bit",
        f"k-bit preparation, autocast to {args.dtype}, as the tutorial does: embeddings, norms, lm_head are float32",
        "given the padding-free batch, which the tutorial does not make",
    )


def _stack(model: torch.nn.Module, dtype: str, *notes: str) -> Stack:
    return Stack(model, autocast(dtype), list(notes))


if __name__ == "__main__":
    serve(build)
