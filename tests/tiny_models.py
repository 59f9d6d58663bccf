"""Mixture-of-experts models of a few thousand weights, saved by transformers itself, and their stock counterparts."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from expertune.checkpoint.load import LoadedModel, load_model
from expertune.checkpoint.meta import auto_class
from expertune.config import QuantizationConfig
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from tests.experts.families import from_matrices

FolderOf = Callable[[str], Path]
"""Gives the tiny checkpoint of a family: the fixture `family_folder`."""

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT_ATTENTION = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

# What sets each family apart; each is a real model's structure at toy size.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4},
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "minimax_m2": {"num_local_experts": 4},
}


def tiny_config(family: str = "mixtral", **changes: Any) -> PretrainedConfig:
    """The configuration of a two-layer model of a family."""
    return AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | changes))


def save_tiny_model(folder: Path, family: str = "mixtral", seed: int = 0, **changes: Any) -> Path:
    """Write a random bfloat16 model under the names of published checkpoints, by transformers' own writer."""
    return save_random(folder, tiny_config(family, **changes), seed)


@torch.no_grad()
def save_random(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """The same for any config."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    saved = model.state_dict(keep_vars=True)
    # Norms of one and biases of zero would hide a mix-up.
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    # How fast a state decays follows from how far apart two tokens are; it is no weight.
    fixed = {id(each) for module in model.modules() if hasattr(module, "decay_factors") for each in module.buffers()}
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and id(buffer) not in fixed:
            buffer.add_(0.02 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


def load_tiny(folder: Path, dtype: torch.dtype = torch.float32, **quantization: Any) -> LoadedModel:
    """The folder with 4-bit experts and linears, on the CPU."""
    return load_model(folder, QuantizationConfig(**quantization), dtype, "cpu")


def copied(loaded: LoadedModel) -> LoadedModel:
    """The same with a model of its own: attaching adapters changes it, and loading takes longer."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def stock_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The folder as transformers loads it, its experts one at a time."""
    config = AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def dequantized(loaded: LoadedModel, folder: Path) -> PreTrainedModel:
    """The stock model over the weights that the 4-bit one decodes to."""
    model = stock_model(folder)
    for name, module in loaded.model.named_modules():
        if isinstance(module, Nf4Experts):
            for parameter, stack in stacked_weights(module, torch.float32).items():
                model.get_submodule(name).get_parameter(parameter).copy_(stack)
        elif isinstance(module, bnb.nn.Linear4bit):
            model.get_submodule(name).get_parameter("weight").copy_(linear_weight(module))
    return model


def stacked_weights(experts: Nf4Experts, dtype: torch.dtype) -> dict[str, Tensor]:
    """The experts' decoded weights as the family stacks them."""
    return {
        weight: torch.stack(
            [
                from_matrices(
                    experts.spec,
                    weight,
                    [
                        experts.dequantize(expert, projection, dtype)
                        for projection in layout.fused_projections(experts.spec, weight)
                    ],
                )
                for expert in range(experts.num_experts)
            ]
        )
        for weight in experts.spec.weight_names
    }


def linear_weight(linear: bnb.nn.Linear4bit) -> Tensor:
    """The weight that a 4-bit linear multiplies by, float32."""
    return bnb_functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def random_rows(num_rows: int = 2, length: int = 12, first: int = 3) -> Tensor:
    """Token ids [num_rows, length] without special tokens."""
    return torch.randint(first, VOCABULARY, (num_rows, length))


def frozen_bytes(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every frozen tensor of a model, scales included."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors[f"{name}.absmax"] = state.absmax.clone()
            tensors[f"{name}.nested_absmax"] = state.state2.absmax.clone()
    return tensors


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in bytes."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]
