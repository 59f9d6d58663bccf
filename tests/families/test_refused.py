"""Models that cannot be tuned here are refused by one error that names the module and what to do."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from expertune.checkpoint.load import load_model
from expertune.checkpoint.meta import auto_class, build_meta_model
from expertune.checkpoint.names import read_names
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.families.build import tiny_config
from tests.tiny_models import tiny_config as tiny_mixtral

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2}


def load(folder: Path, config: PretrainedConfig) -> None:
    auto_class(config).from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_model(folder, QuantizationConfig(), torch.float32, "cpu")


def test_dense_model_is_refused_with_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"^{tmp_path}: LlamaForCausalLM has no experts.*plain PEFT with bitsandbytes"
    ):
        load(tmp_path, AutoConfig.for_model("llama", **SMALL))


def test_family_with_experts_whose_config_asks_for_none_is_a_dense_one(tmp_path: Path) -> None:
    config = tiny_config("gemma4_text").to_dict() | {"enable_moe_block": False}
    with pytest.raises(UnsupportedModelError, match=r": Gemma4ForCausalLM has no experts"):
        load(tmp_path, AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("llama4_text", r"layers\.0\.feed_forward\.experts: Llama4TextExperts"),
        ("longcat_flash", r"layers\.0\.mlp\.experts: LongcatFlashExperts"),
        ("jetmoe", r"layers\.0\.mlp\.input_linear: JetMoeParallelExperts"),
    ],
)
def test_experts_outside_the_contract_are_refused_by_module(kind: str, module: str, tmp_path: Path) -> None:
    tiny_config(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"{module} holds experts outside transformers' experts contract"):
        read_names(build_meta_model(tmp_path, torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "size"),
    [({"hidden_size": 96}, "hidden size 96"), ({"intermediate_size": 100}, "intermediate size 100")],
)
def test_width_that_blocks_do_not_divide_is_refused_by_module_and_size(
    changes: dict[str, int], size: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf": model\.layers\.0\.mlp\.experts: {size} is no multiple of 64"):
        load(tmp_path, tiny_mixtral(**changes))


def test_model_that_predicts_no_tokens_is_refused_by_its_config(tmp_path: Path) -> None:
    AutoConfig.for_model("openai_privacy_filter").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: transformers cannot build this model"):
        build_meta_model(tmp_path, torch.bfloat16)


def test_transposed_stack_of_the_wrong_width_is_refused_by_the_familys_layout(tmp_path: Path) -> None:
    config = tiny_config("gpt_oss")
    config.intermediate_size = 96
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts: intermediate size 96 is no multiple of 64"):
        load(tmp_path, config)


@pytest.mark.parametrize("value", [99, 5, 0])
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("qwen3_moe", "num_experts_per_tok"),
        ("hunyuan_v1_moe", "moe_topk"),
        ("ernie4_5_moe", "moe_k"),
        ("gemma4_text", "top_k_experts"),  # its router asks the config each time
    ],
)
def test_config_that_routes_a_token_to_more_experts_than_there_are_or_to_none_is_refused(
    kind: str, key: str, value: int, tmp_path: Path
) -> None:
    config = tiny_config(kind)
    setattr(config, key, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} .* is {value}, but \S+\.experts has 4 experts"):
        read_names(build_meta_model(tmp_path, torch.bfloat16))
