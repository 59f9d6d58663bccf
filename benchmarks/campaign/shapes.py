"""The shapes that are measured: published models at full size, and small ones for a dry run on a CPU."""

from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Lora, Shape


@dataclass(frozen=True)
class Model:
    """A model and how it is trained.

    Attributes:
        name: of the published model.
        layer: one expert layer of it.
        lora: rank, alpha and dropout.
        targets: of the adapter, by the checkpoint's names.
        config: the `config.json`.
    """

    name: str
    layer: Shape
    lora: Lora
    targets: tuple[str, ...]
    config: dict[str, Any]


def mixtral(small: bool) -> Model:
    """Mixtral-8x7B-v0.1 with the recipe's adapter."""
    shape = Shape(512, 256, 2, 4, 2) if small else Shape(4096, 14336, 32, 8, 2)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head")
    return Model("Mixtral-8x7B", shape, Lora(), targets, shape.config())


def qwen3(small: bool, layers: int = 48) -> Model:
    """Qwen3-30B-A3B, r 16 on attention and experts, no dropout: what its published step times are of."""
    shape = Shape(512, 128, 2, 8, 2) if small else Shape(2048, 768, layers, 128, 8)
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": 4 * shape.intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4 if small else 32,
        "num_key_value_heads": 2 if small else 4,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": 32_000 if small else 151_936,
        "torch_dtype": "bfloat16",
    }
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Model("Qwen3-30B-A3B", shape, Lora(16, 16, 0.0), targets, config)


MODELS = {"mixtral": mixtral, "qwen3": qwen3}


def tokens(small: bool) -> tuple[int, ...]:
    """Tokens of a step for which targets are set."""
    return (32, 48) if small else (320, 2048, 8192)
