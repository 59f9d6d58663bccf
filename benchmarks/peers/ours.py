"""Expertune: NF4 experts in one module per layer, adapters stacked."""

import argparse

import torch

from benchmarks.peers.driver import Stack, serve
from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.placement.device import bound_host_memory


def build(args: argparse.Namespace) -> Stack:
    bound_host_memory()  # as every run of ours begins
    loaded = load_model(args.model, QuantizationConfig(), torch.bfloat16, args.device)
    model = attach(loaded, LoraSection(init_from=str(args.adapter), dropout=args.dropout), "benchmark")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Stack(model)


if __name__ == "__main__":
    serve(build)
