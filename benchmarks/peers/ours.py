"""Expertune: NF4 experts in one module per layer, adapters stacked."""

import argparse
import sys

import torch

from benchmarks.peers.driver import Stack, serve
from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.experts.module import keep_inner
from expertune.objectives.chunked_loss import LanguageModelLoss


def build(args: argparse.Namespace) -> Stack:
    loaded = load_model(args.model, QuantizationConfig(), getattr(torch, args.dtype), args.device)
    fresh = {"r": args.rank, "alpha": args.alpha}
    given = fresh if args.adapter is None else {"init_from": str(args.adapter)}
    model = attach(loaded, LoraSection(**given, dropout=args.dropout), "benchmark")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.keep:
        keep_inner(model, sys.maxsize)
    return Stack(model, LanguageModelLoss(model).in_chunks)  # as the trainer takes its loss


if __name__ == "__main__":
    serve(build)
