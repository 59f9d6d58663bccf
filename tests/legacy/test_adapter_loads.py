"""An adapter of ours, read by the stock PEFT of the tutorial's days over the same frozen weights."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from expertune.adapt.attach import attach
from expertune.checkpoint.load import LoadedModel, load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.experts.module import Nf4Experts
from tests.legacy.conftest import RunLegacy

pytestmark = pytest.mark.slow


def write_random_mixtral(folder: Path) -> None:
    """A 2-layer Mixtral, per-expert names on disk, weights wide enough that every part shows in the logits."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    # transformers 5 writes the names of the checkpoint, one tensor per expert and projection.
    MixtralForCausalLM(config).save_pretrained(folder)


def dequantized(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every frozen weight as our 4-bit model computes with it, float32, under its name on disk."""
    tensors = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, Nf4Experts):
            for projection in module.spec.projections:
                for expert in range(module.num_experts):
                    key = loaded.names.expert_on_disk(name, expert, projection)
                    tensors[f"{key}.weight"] = module.dequantize(expert, projection, torch.float32)
        elif isinstance(module, Linear4bit):
            weight = module.weight
            decoded = bnb.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
            tensors[f"{loaded.names.on_disk(name)}.weight"] = decoded
    for name, parameter in loaded.model.named_parameters():
        if parameter.is_floating_point():
            tensors[loaded.names.on_disk(name)] = parameter.detach().to(torch.float32)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def test_logits_agree_on_the_legacy_stack(tmp_path: Path, run_legacy: RunLegacy) -> None:
    write_random_mixtral(tmp_path / "base")
    loaded = load_model(tmp_path / "base", QuantizationConfig(), torch.float32, "cpu")
    plain = tmp_path / "dequantized"
    plain.mkdir()
    save_file(dequantized(loaded), plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())

    section = LoraSection(r=4, alpha=8, dropout=0.05, targets=["attention", "experts", "lm_head"])
    model = attach(loaded, section, str(plain))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(str(tmp_path / "adapter"))
    model.eval()
    input_ids = torch.randint(3, 512, (2, 48), generator=generator)
    with torch.no_grad():
        adapted = model(input_ids).logits
        with model.disable_adapter():
            base = model(input_ids).logits

    save_file({"input_ids": input_ids}, tmp_path / "input.safetensors")
    job = {
        "model": plain,
        "adapter": tmp_path / "adapter",
        "input": tmp_path / "input.safetensors",
        "output": tmp_path / "logits.safetensors",
    }
    run_legacy("legacy_logits", job, tmp_path)
    theirs = load_file(tmp_path / "logits.safetensors")

    assert (adapted - base).abs().max() > 1, "the adapter must show, or agreement would mean nothing"
    torch.testing.assert_close(theirs["base"], base, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs["adapted"], adapted, atol=1e-4, rtol=0)
