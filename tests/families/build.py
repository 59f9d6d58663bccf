"""A tiny model of any family with experts, made from the family's own default config by the names of its sizes.

Nothing here knows a family, save for `EXCEPT`: sizes that a family derives from others in a way of its own.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.experts.families import experts_classes

VOCABULARY = 96
FIRST_SPECIAL = 60
"""Ids from here on may mean an image or a sound."""

HIDDEN, INTERMEDIATE, HEADS, HEAD = 64, 64, 4, 16

# The largest that a size may be, by the names that configs give it; what a config does not have is not set.
SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": 2 * INTERMEDIATE,
    "dense_intermediate_size": 2 * INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": INTERMEDIATE,
    "shared_experts_intermediate_size": INTERMEDIATE,
    "moe_shared_expert_intermediate_size": INTERMEDIATE,
    "shared_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_heads": HEADS,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "swa_head_dim": HEAD,
    "d_rel": 8,
    "max_position_embeddings": 128,
    "model_max_length": 128,
    # latent attention, and its index
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "qk_head_dim": 2 * HEAD,
    "v_head_dim": HEAD,
    "rotary_dim": HEAD // 2,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": HEAD,
    "index_topk": 64,
    # state in place of attention
    "linear_num_heads": HEADS,
    "linear_head_dim": HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": HEAD,
    "mamba_head_dim": HEAD,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "ssm_state_size": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "block_size": 8,
    "hc_lowrank": 32,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "router_hidden_size": 32,
    "sliding_window": 8,
    "sliding_window_size": 8,
    # pictures and sound, which no test sends in
    "depth": 1,
    "encoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "d_model": 64,
    "mlp_dim": 64,
    "image_size": 28,
    "out_hidden_size": HIDDEN,
    "output_dim": HIDDEN,
    "output_channels": 32,
    "downsample_hidden_size": 16,
    "downsample_channels": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    "projector_hidden_size": 64,
    "projection_intermediate_size": 64,
}

# Needed by the one that has them at all, and not given by every default.
NEEDED = {"num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "head_dim"}

PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "layer_rope_theta",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "depths",
    "hidden_sizes",
    "patch_sizes",
)
"""Lists with an entry for each layer: a tiny model has one layer of each kind that the full one has."""

# What a family derives from its other sizes in a way of its own, or leaves to those who train it.
EXCEPT: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v4": {"num_attention_heads": 8},  # two groups of a width that would be quantized
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_qk_nope_head_dim": HEAD,
        "swa_qk_rope_head_dim": HEAD,
        "swa_head_dim": 2 * HEAD,
        "swa_v_head_dim": HEAD,
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [3, 3, 2]}}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "glm4v_moe": {"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "muse_spark": {"audio_config": {"num_hidden_layers": 1, "depths": [1], "hidden_sizes": [16], "patch_sizes": [4]}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}


def model_types() -> list[str]:
    """A model type for each family that has experts: its language model, by itself where it can stand by itself."""
    return [each for family in families() if (each := model_type(family)) is not None]


def families() -> list[str]:
    """Folders of transformers that define an experts class."""
    return sorted({file.parent.name for file in experts_classes().values()})


def model_type(family: str) -> str | None:
    """The family's model type that has a class which predicts tokens; None where it has none."""
    types = [each for each in CONFIG_MAPPING_NAMES if model_type_to_module_name(each) == family]
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        able = sorted((each for each in types if each in mapping), key=lambda each: -len(each))
        if able:
            return able[0]
    return None


def tiny_config(kind: str) -> PretrainedConfig:
    """The config of a tiny model of a model type."""
    default = AutoConfig.for_model(kind)
    sizes = _small(default)
    within = {"text_config": EXCEPT[f"{kind}_text"]} if f"{kind}_text" in EXCEPT else {}
    for name, value in (EXCEPT.get(kind, {}) | within).items():
        sizes[name] = sizes[name] | value if isinstance(value, dict) else value
    return type(default)(**sizes)


def _small(default: PretrainedConfig) -> dict[str, Any]:
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small: dict[str, Any] = {
        name: _small(value) for name, value in values.items() if isinstance(value, PretrainedConfig)
    }
    small |= {name: _at_most(values[name], size, name in NEEDED) for name, size in SIZES.items() if name in values}
    if values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = HEADS
    if values.get("qk_head_dim") == values.get("head_dim") is not None:
        small["head_dim"] = SIZES["qk_head_dim"]
    small |= {"initializer_range": 0.1} if "initializer_range" in values else {}
    small |= {name: [] for name in ("mlp_only_layers",) if values.get(name)}
    small |= _layers(values)
    small |= _rotary(values)
    specials = sorted(name for name, value in values.items() if name.endswith(("_token_id", "_token_index")) and value)
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return small | {name: FIRST_SPECIAL + index for index, name in enumerate(specials)} | usual


def _at_most(value: Any, size: int, needed: bool) -> Any:
    if isinstance(value, list | tuple):
        return [size] * len(value)
    if value is None:
        return size if needed else None
    return min(value, size)


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    lists = {name: values[name] for name in PER_LAYER if values.get(name)}
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=False))
    chosen = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    if len(chosen) == 1:
        chosen = [0, 0]
    shortened = {name: [each[index] for index in chosen] for name, each in lists.items()}
    if "num_attention_heads_per_layer" in shortened:
        shortened["num_attention_heads_per_layer"] = [HEADS] * len(chosen)
    return shortened | {"num_hidden_layers": len(chosen)}


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding in three axes, as parts of a smaller head."""
    rotary = values.get("rope_parameters")
    if not isinstance(rotary, dict) or "mrope_section" not in rotary:
        return {}
    section = [part * HEAD // values["head_dim"] for part in rotary["mrope_section"]]
    pairs = sum(rotary["mrope_section"]) * HEAD // values["head_dim"]
    section[0] += pairs - sum(section)
    return {"rope_parameters": {**rotary, "mrope_section": section}}
