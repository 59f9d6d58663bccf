"""What the quality study compares: each variant is what it changes in the run file of `cells.run_file`.

An option that this version of the run file does not know is left out with the reason, as is one that it refuses.
"""

from dataclasses import dataclass

from benchmarks.quality_study.sixteen_bit import ROUTE


@dataclass(frozen=True)
class Variant:
    """A variant.

    Attributes:
        name: for the page.
        overrides: `section.key=value`.
        group: what it is compared within.
        seeds: how many; side variants have fewer.
        in_16_bits: the frozen weights are those of the checkpoint.
        starts_elsewhere: the adapter is not zero at the start, so that the loss at step 0 is its own.
    """

    name: str
    overrides: tuple[str, ...] = ()
    group: str = "base"
    seeds: int = 3
    in_16_bits: bool = False
    starts_elsewhere: bool = False


REFERENCE, DEFAULT = "16-bit LoRA", "NF4, defaults"

_LOAD = "lora.experts.select=load"

VARIANTS = (
    Variant(REFERENCE, (ROUTE,), "base", in_16_bits=True, starts_elsewhere=True),
    Variant(DEFAULT, (), "base", starts_elsewhere=True),
    Variant("without double quantization", ("quantization.double_quantization=false",), "bytes", seeds=1),
    Variant("fit: mse", ("quantization.fit=mse",), "bytes", starts_elsewhere=True),
    Variant("fit: calibrated", ("quantization.fit=calibrated",), "bytes", starts_elsewhere=True),
    Variant("attention in 16 bits", ("quantization.layers.attention=16",), "bytes", starts_elsewhere=True),
    Variant("init: loftq", ("lora.init=loftq",), "start", starts_elsewhere=True),
    Variant("init: qera", ("lora.init=qera",), "start", starts_elsewhere=True),
    Variant("init: pissa", ("lora.init=pissa",), "start"),
    Variant("experts: load, share 0.2", (_LOAD, "lora.experts.share=0.2"), "experts"),
    Variant("experts: load, share 0.5", (_LOAD, "lora.experts.share=0.5"), "experts"),
    Variant("experts: load, share 0.8", (_LOAD, "lora.experts.share=0.8"), "experts"),
    Variant("expert_rank: scaled", ("lora.expert_rank=scaled",), "experts"),
    Variant("expert_rank: load", ("lora.expert_rank=load",), "experts"),
    Variant("router tuned", ("lora.targets=[attention, experts, lm_head, router]",), "experts"),
    Variant(
        "router tuned, aux_loss 0.02, z_loss 0.001",
        ("lora.targets=[attention, experts, lm_head, router]", "router.aux_loss=0.02", "router.z_loss=0.001"),
        "experts",
    ),
    Variant("use_dora", ("lora.use_dora=true",), "adapter"),
    Variant("rslora, alpha 16", ("lora.rslora=true", "lora.alpha=16"), "adapter"),
    Variant("LoRA+, ratio 16, lr 2e-3", ("lora.loraplus_lr_ratio=16", "training.learning_rate=2e-3"), "adapter"),
    Variant("neftune 5", ("training.neftune_noise_alpha=5",), "adapter"),
    Variant("muon", ("training.optim=muon",), "adapter"),
    Variant("8-bit AdamW", ("training.optim=adamw_8bit",), "adapter", seeds=1),
    Variant("half the learning rate", ("training.learning_rate=2e-3",), "adapter"),
    Variant("a quarter of the learning rate", ("training.learning_rate=1e-3",), "adapter"),
)
