"""What aliases among the targets mean: modules that a text's loss reaches, tried before anything is attached."""

from pathlib import Path

import pytest
import torch
from torch import nn

from expertune.adapt.attach import attach
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.reachability import reachable_modules
from expertune.checkpoint.linears import is_linear
from expertune.config import LoraSection
from expertune.errors import ConfigError
from expertune.experts.module import Nf4Experts
from expertune.kernels.routes import settings_of
from tests.families.build import tiny_config
from tests.tiny_models import frozen_bytes, load_tiny, save_random, save_tiny_model


def attached(folder: Path, *targets: str) -> ExpertPeftModel:
    return attach(load_tiny(folder), LoraSection(r=2, dropout=0.0, targets=list(targets)), str(folder))


def adapted(model: nn.Module) -> set[str]:
    """Live names of the modules that have an adapter."""
    return {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }


def test_every_linear_and_all_experts_of_a_plain_family_are_reached(tmp_path: Path) -> None:
    model = load_tiny(save_tiny_model(tmp_path)).model
    candidates = {name: each for name, each in model.named_modules() if is_linear(each) or isinstance(each, Nf4Experts)}
    assert len(candidates) == 2 * (4 + 1) + 1
    before = frozen_bytes(model)
    assert reachable_modules(model, candidates) == candidates.keys()
    assert not settings_of(model).ran  # no expert was computed, from wherever its bytes would have come
    assert frozen_bytes(model).keys() == before.keys()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "kept", "left_out"),
    [
        ("deepseek_v32", ".self_attn.o_proj", ".self_attn.indexer.wq_b"),  # picks tokens, without a gradient
        ("jamba", ".mamba.in_proj", ".mamba.dt_proj"),  # its weight is taken, it is never called
        ("nemotron_h", ".mixer.in_proj", ".mixer.out_proj"),  # PEFT refuses it
    ],
)
def test_alias_leaves_out_what_cannot_learn(kind: str, kept: str, left_out: str, tmp_path: Path) -> None:
    names = adapted(attached(save_random(tmp_path, tiny_config(kind)), "attention"))
    assert any(name.endswith(kept) for name in names)
    assert not any(name.endswith(left_out) for name in names)


def test_experts_for_pictures_are_none_of_a_text_run(tmp_path: Path) -> None:
    names = adapted(attached(save_random(tmp_path, tiny_config("ernie4_5_vl_moe")), "experts"))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {"text_moe"}


def test_module_that_is_named_is_taken_at_its_word(tmp_path: Path) -> None:
    names = adapted(attached(save_random(tmp_path, tiny_config("deepseek_v32")), "wq_b"))
    assert names
    assert all(name.endswith(".indexer.wq_b") for name in names)


def test_linear_that_computes_otherwise_is_neither_quantized_nor_adapted(tmp_path: Path) -> None:
    class Grouped(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).roll(1)

    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(Grouped(2, 2))
    folder = save_random(tmp_path, tiny_config("deepseek_v4"))
    model = load_tiny(folder).model
    grouped = [each for each in model.modules() if isinstance(each, nn.Linear) and not is_linear(each)]
    assert grouped
    assert all(each.weight.dtype == torch.float32 and each.in_features % 64 == 0 for each in grouped)
    with pytest.raises(ConfigError, match="no module is called 'o_a_proj'"):
        attached(folder, "o_a_proj")
