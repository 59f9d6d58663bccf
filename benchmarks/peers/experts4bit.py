"""experts4bit-qlora: NF4 experts streamed in by its loader, its fused training route over grouped-nf4-gemm."""

import argparse

from benchmarks.peers.driver import Stack, serve
from benchmarks.peers.gpu import describe, require


def build(args: argparse.Namespace) -> Stack:
    require(args, "experts4bit_qlora", "nf4_qlora", "transformers")
    return build_on(args, "cuda", "grouped_nf4")


def build_on(args: argparse.Namespace, device: str, expert_kernel: str) -> Stack:
    """The stack by its own one-call recipe, on a device and with an expert kernel (`reference` runs on a CPU too)."""
    from experts4bit_qlora.recipe import QLoRASetup, prepare_qlora_training

    setup = QLoRASetup(r=args.rank, alpha=args.alpha, adapter_dtype="fp32", attn_4bit=True, expert_kernel=expert_kernel)
    prepared = prepare_qlora_training(str(args.model), setup, device=device)
    return Stack(
        prepared.model,
        notes=[
            "w1 and w3 share the A of one adapter of rank r: fewer weights than ours train",
            "lm_head has no adapter and no adapter has dropout: the peer offers neither",
            *describe(prepared.model),
        ],
        packages=("experts4bit-qlora", "grouped-nf4-gemm") if expert_kernel == "grouped_nf4" else (),
    )


if __name__ == "__main__":
    serve(build)
