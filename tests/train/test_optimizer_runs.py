"""Runs with Muon, with 8-bit states on a CPU and with LoRA+: exact resume, the states that the plan counts, rates."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.planning import make_plan
from expertune.train.optim import make_optimizer
from expertune.train.trainer import ExpertTrainer
from tests.train.scarce import adapter_bytes, run

SHORT = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no", "gradient_checkpointing": False, "warmup_steps": 0}


def resumed(values: dict[str, Any], out: Path, settings: dict[str, Any]) -> bytes:
    """The adapter of a run that resumes from its first checkpoint."""
    for late in ("adapter", "checkpoint-2"):
        shutil.rmtree(out / late)
    run(values, out, resume=True, **settings)
    return adapter_bytes(out)


def _flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a parameter's state; bitsandbytes wraps some in a mapping of their own."""
    tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= _flat(value)
        elif isinstance(value, torch.Tensor) and value.ndim:
            tensors[name] = value
    return tensors


def check(values: dict[str, Any], out: Path, share: float, **settings: Any) -> dict[str, Any]:
    """A run's optimizer as a checkpoint has it; the run resumes exactly, and the plan counts its states."""
    run(values, out, **settings)
    state: dict[str, Any] = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)
    state["state"] = states = [_flat(each) for each in state["state"].values()]
    held = sum(each.nbytes for of_one in states for name, each in of_one.items() if not name.startswith("qmap"))
    training = values["training"] | settings["training"]
    config = parse_config(values | settings | {"training": training})
    planned = make_plan(config, torch.device("cpu"), memory="8GB").memory.phases["update"]["optimizer"]
    assert share * planned <= held <= planned
    whole = adapter_bytes(out)
    assert resumed(values, out, settings) == whole
    return state


def test_muon_resumes_exactly_and_leaves_the_output_head_to_adamw(run_values: dict[str, Any], tmp_path: Path) -> None:
    lora = run_values["lora"] | {"loraplus_lr_ratio": 2.0}
    state = check(run_values, tmp_path / "whole", 1.0, training=SHORT | {"optim": "muon"}, lora=lora)
    lowest = state["param_groups"][0]["initial_lr"]
    assert [(group["muon"], group["initial_lr"] / lowest) for group in state["param_groups"]] == [
        (True, 1),
        (True, 2),
        (False, 1),
        (False, 2),
    ]


def test_8bit_states_on_a_cpu_resume_exactly_and_take_a_quarter(run_values: dict[str, Any], tmp_path: Path) -> None:
    state = check(
        run_values,
        tmp_path / "whole",
        0.9,
        training=SHORT | {"optim": "adamw_8bit"},
        # bitsandbytes keeps states of fewer than 4096 numbers in 32 bits.
        lora=run_values["lora"] | {"r": 64, "targets": ["experts"]},
    )
    assert {each["state1"].dtype for each in state["state"]} == {torch.uint8}


def test_loraplus_moves_b_faster_than_a_by_its_ratio(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, float] = {}
    real = ExpertTrainer.create_optimizer

    def watch(self: Any, *arguments: Any, **settings: Any) -> Any:
        optimizer = real(self, *arguments, **settings)
        factors = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        with torch.no_grad():  # with B at zero no gradient reaches A
            for name, factor in factors.items():
                if "lora_B" in name:
                    factor.normal_()
        before = {name: factor.detach().clone() for name, factor in factors.items()}

        def measure(*_: Any) -> None:
            for name, factor in factors.items():
                moved.setdefault(name, float((factor.detach() - before[name]).abs().max()))

        optimizer.register_step_post_hook(measure)
        return optimizer

    monkeypatch.setattr(ExpertTrainer, "create_optimizer", watch)
    training = SHORT | {"max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    run(run_values, tmp_path / "run", training=training, lora=run_values["lora"] | {"loraplus_lr_ratio": 16.0})
    rate = run_values["training"]["learning_rate"]
    # AdamW's first update moves each number by its learning rate, whatever its gradient: of linears and of experts.
    assert len(moved) == 2 * (2 * (4 + 3) + 1)
    for name, distance in moved.items():
        assert distance == pytest.approx(16 * rate if "lora_B" in name else rate, rel=0.01), name


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw", "adalomo"])
def test_loraplus_with_an_optimizer_that_groups_by_itself_is_refused(run_values: dict[str, Any], name: str) -> None:
    run_values["lora"]["loraplus_lr_ratio"] = 16
    run_values["training"]["optim"] = name
    with pytest.raises(ConfigError, match=f"loraplus_lr_ratio needs .* training.optim {name} makes its own groups"):
        parse_config(run_values)


def test_without_a_ratio_and_muon_the_optimizer_is_transformers_own() -> None:
    class Arguments:
        optim = "adamw_torch"

    assert make_optimizer(torch.nn.Linear(2, 2), Arguments(), None) is None
