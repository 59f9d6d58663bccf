"""Experts that had tokens and get none any more: told of once, in the record and on the page."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from expertune import finetune
from expertune.config import parse_config
from expertune.train.expert_load import add_tokens, died
from expertune.train.trainer import ExpertTrainer


def series_of(steps: list[list[int]]) -> dict[str, Any]:
    series: dict[str, Any] = {}
    for step, tokens in enumerate(steps, 1):
        add_tokens(series, step, {"layers.0": tokens})
    return series


@pytest.mark.parametrize(
    ("steps", "dead"),
    [
        ([[10, 10, 0]] * 5 + [[20, 0, 0]] * 20, [1]),  # and not the one that never had a token
        ([[10, 10, 0]] * 5 + [[20, 0, 0]] * 19, []),
        ([[10, 10, 0]] * 5 + [[20, 0, 0]] * 30 + [[19, 1, 0]], []),  # it came back
        ([[99, 1, 0]] * 5 + [[100, 0, 0]] * 90, []),  # few tokens would have been its own
        ([[99, 1, 0]] * 5 + [[100, 0, 0]] * 200, [1]),  # stretches of four steps
    ],
)
def test_an_expert_is_dead_after_twenty_steps_and_a_hundred_tokens_that_it_did_not_get(
    steps: list[list[int]], dead: list[int]
) -> None:
    assert died(series_of(steps)) == ({"layers.0": dead} if dead else {})


class Starves(TrainerCallback):
    """After the fifth step all tokens lie in one direction, and one expert's row of a router in the opposite."""

    def __init__(self, model: Any) -> None:
        self.embedding, self.router = model.embed_tokens.weight, model.layers[1].mlp.gate.weight

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.embedding += 1.0
            self.router[2] = -1.0


def test_an_expert_that_is_driven_to_death_is_told_of_once_on_the_terminal_in_the_record_and_on_the_page(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ExpertTrainer.train

    def train(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.add_callback(Starves(self.model.get_base_model().model))
        return real(self, *arguments, **settings)

    monkeypatch.setattr(ExpertTrainer, "train", train)
    run_values["training"] |= {"max_steps": 30, "eval_strategy": "no", "save_strategy": "no"}
    run_values["training"] |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    run_values["lora"]["targets"] = ["router"]
    console = Console(file=io.StringIO(), width=200)
    run = finetune(parse_config(run_values), console=console)
    dead = run.record["train"]["experts_died"]
    counts = run.record["train"]["expert_tokens"]["counts"]
    assert dead
    for name, experts in dead.items():
        assert all(sum(of_step[expert] for of_step in counts[name][-20:]) == 0 for expert in experts)
        assert all(sum(of_step[expert] for of_step in counts[name][:5]) > 0 for expert in experts)
    line = "died while training: tokens at first, and none any more (layer"
    assert " ".join(console.file.getvalue().split()).count(line) == 1  # type: ignore[attr-defined]
    assert line in Path(run_values["output_dir"], "report.html").read_text(encoding="utf-8")
    assert json.loads(Path(run_values["output_dir"], "record.json").read_text())["train"]["experts_died"] == dead
