"""Today's stock stack: transformers 5 and peft 0.21, whose fused experts bitsandbytes passes over in silence."""

import argparse

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.driver import Stack, autocast, serve


def build(args: argparse.Namespace) -> Stack:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=getattr(torch, args.dtype), device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = PeftConfig.from_pretrained(args.adapter)
    config.lora_dropout = 0.0
    model = PeftModel.from_pretrained(model, args.adapter, config=config, is_trainable=True)
    return Stack(
        model,
        autocast(args.dtype),
        [
            f"experts stay {args.dtype}: bitsandbytes passes over fused parameters, so its loss is not the others'",
            "dropout 0, on every target: peft refuses any other value on fused experts",
            "w1 and w3 share one adapter of rank 2r on fused experts, so it trains more parameters",
        ],
    )


if __name__ == "__main__":
    serve(build)
