"""What is not finite stops a run before it reaches the adapter or a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expertune import finetune
from expertune.config import parse_config
from expertune.errors import NonFiniteGradientError, NonFiniteLossError
from expertune.run import training
from expertune.run.record import RunRecord
from expertune.train.finite import is_lowered_by_scaler, norm_of_gradients
from expertune.train.trainer import ExpertTrainer

BadGradient = Callable[[int, float], None]


@pytest.fixture
def bad_gradient(monkeypatch: pytest.MonkeyPatch) -> BadGradient:
    """One number of one factor's gradient is bad in a step; losses stay as they are."""

    def put(step: int, value: float) -> None:
        class Damaged(ExpertTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                factor = next(each for name, each in self.model.named_parameters() if "lora_B" in name)
                factor.register_hook(self.damage)

            def damage(self, gradient: torch.Tensor) -> torch.Tensor:
                if self.state.global_step + 1 == step:
                    gradient = gradient.clone()
                    gradient.view(-1)[0] = value
                return gradient

        monkeypatch.setattr(training, "ExpertTrainer", Damaged)

    return put


@pytest.mark.parametrize(("max_grad_norm", "value"), [(1.0, float("nan")), (0.0, float("nan")), (0.0, float("inf"))])
def test_train_stops_before_a_gradient_that_is_not_finite_is_taken(
    max_grad_norm: float, value: float, run_values: dict[str, Any], bad_gradient: BadGradient
) -> None:
    bad_gradient(3, value)
    run_values["training"] |= {"max_steps": 4, "save_steps": 1, "eval_strategy": "no", "max_grad_norm": max_grad_norm}
    with pytest.raises(NonFiniteGradientError) as error:
        finetune(parse_config(run_values))

    message, run_dir = str(error.value), Path(run_values["output_dir"])
    assert f"the norm of the gradients became {value}" in message
    assert "lora_B" in message
    assert "in step 3 on rows.jsonl: row " in message
    assert f"the last good checkpoint is {run_dir}/checkpoint-2 (the weights that this step began with)" in message
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not (run_dir / "adapter").exists()
    record = RunRecord.load(run_dir)
    assert record["run"]["status"] == "stopped"
    assert [step for step, _ in record["train"]["loss"]] == [1, 2]


def test_train_keeps_no_weights_that_the_update_made_not_finite(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class DividesByZero(ExpertTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = super().create_optimizer(*args, **kwargs)
            factor = next(each for name, each in self.model.named_parameters() if "lora_A" in name)
            optimizer.register_step_post_hook(lambda *_: factor.detach().view(-1)[:1].fill_(float("nan")))
            return optimizer

    monkeypatch.setattr(training, "ExpertTrainer", DividesByZero)
    run_values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    with pytest.raises(
        NonFiniteLossError, match=r"step 1 left weights that are not finite .*lora_A.*no checkpoint yet"
    ):
        finetune(parse_config(run_values))
    assert not list(Path(run_values["output_dir"]).glob("*/adapter_model.safetensors"))


def test_norm_is_computed_where_the_trainer_did_not() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert norm_of_gradients(layer, None) == 5.0
    assert norm_of_gradients(layer, torch.tensor(7.0)) == 7.0


def test_overflow_under_float16_is_the_scalers_business_until_its_scale_is_one() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))  # makes the scale
    assert is_lowered_by_scaler(float("inf"), scaler)
    assert not is_lowered_by_scaler(1.0, scaler)
    assert not is_lowered_by_scaler(float("inf"), None)
    scaler.update(1.0)
    assert not is_lowered_by_scaler(float("nan"), scaler)
