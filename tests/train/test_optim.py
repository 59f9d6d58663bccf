"""What is known of an optimizer by its name, against the optimizers themselves."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import expertune
from expertune.train.optim import make_optimizer
from expertune.train.optimizers import default_optimizer, state_bytes, usable_optimizer


@pytest.mark.parametrize("name", ["adamw_torch", "adagrad", "rmsprop", "sgd"])
def test_state_is_as_large_as_the_optimizer_that_transformers_builds(name: str, tmp_path: Path) -> None:
    model = nn.Linear(64, 32, bias=False)
    optimizer = Trainer(model, TrainingArguments(str(tmp_path), optim=name, use_cpu=True)).create_optimizer()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    held = sum(each.nbytes for each in states if each.numel() > 1)
    assert state_bytes(name, model.weight.numel(), 4, "cpu") == held


@pytest.mark.parametrize(("name", "numbers"), [("paged_adamw_8bit", 2), ("lion_8bit", 1)])
def test_8bit_state_is_a_byte_and_a_share_of_a_scale(name: str, numbers: int) -> None:
    assert state_bytes(name, 256, 4, "cuda") == numbers * (256 + 4)


def test_what_needs_cuda_is_replaced_on_a_cpu() -> None:
    assert usable_optimizer("paged_lion_8bit", "cpu") == default_optimizer("cpu") == "adamw_torch"
    assert state_bytes("paged_lion_8bit", 10, 4, "cpu") == 80
    assert usable_optimizer("paged_lion_8bit", "cuda") == "paged_lion_8bit"


def test_loraplus_gives_its_rate_to_b_alone_and_to_no_magnitude(tmp_path: Path) -> None:
    assets = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
    model = expertune.attach(expertune.load_model(assets, dtype="float32"), r=4, use_dora=True)
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True)
    for name in ("adamw_torch", "muon"):
        args.optim = name
        groups = make_optimizer(model, args, 16.0).param_groups
        rates = {id(each): group["lr"] for group in groups for each in group["params"]}
        found = {name: rates[id(each)] for name, each in model.named_parameters() if each.requires_grad}
        assert {rate for name, rate in found.items() if "lora_B" in name} == {16e-3}
        assert {rate for name, rate in found.items() if "lora_B" not in name} == {1e-3}
        assert sum("magnitude" in name for name in found) > 1
