"""Losses over answers against the trainers that TRL itself makes, on the same 4-bit model and adapter."""

import dataclasses
import importlib
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import expertune
from expertune.config import parse_config
from expertune.config.trl_keys import _LOSSES
from expertune.objectives.log_probs import Reference
from expertune.train.arguments import loss_arguments
from expertune.train.neftune import sequence_lengths

pytestmark = pytest.mark.filterwarnings("ignore")
trl = pytest.importorskip("trl")

from expertune.objectives.preference import Preference  # noqa: E402 - which imports TRL

ASSETS = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
PROMPTS = ["name: The Vaults, eatType: pub", "name: Aromi", "a much longer prompt than all of the others are here"]
PAIRS = [
    {"prompt": prompt, "chosen": f" inform(name[{prompt[6:12]}], eatType[pub])", "rejected": f" {prompt[:number]}"}
    for number, prompt in enumerate(PROMPTS, 8)
]
LABELED = [
    {"prompt": each["prompt"], "completion": each[way], "label": way == "chosen"}
    for each in PAIRS
    for way in ("chosen", "rejected")
]
DPO = {
    "sigmoid": {},
    **{each: {} for each in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero")},
    **{each: {} for each in ("apo_down", "discopop", "sft", "sigmoid_norm")},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1, "beta": 0.3},
}
CASES = {
    **{f"dpo {loss}": ("dpo", {"loss_type": loss, **more}) for loss, more in DPO.items()},
    "dpo of two losses": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}),
    "dpo with ld_alpha": ("dpo", {"ld_alpha": 0.4}),
    "dpo with another divergence": ("dpo", {"f_divergence_type": "js_divergence"}),
    "dpo with the router's loss": ("dpo", {"router_aux_loss_coef": 0.5}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    "kto without a KL term": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "orpo": ("orpo", {"beta": 0.3}),
}


def test_losses_that_a_run_file_may_name_are_those_of_trl() -> None:
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(trl.DPOConfig) if field.metadata}
    assert set(re.findall(r"`'(\w+)'`", told["loss_type"])) == set(_LOSSES["dpo"])
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(trl.KTOConfig)}
    assert set(choices["loss_type"]) == set(_LOSSES["kto"])


@pytest.fixture(scope="module")
def model() -> Any:
    return expertune.attach(expertune.load_model(ASSETS, dtype="float32"), r=4)


def trl_trainer(objective: str, model: Any, folder: Path, arguments: dict[str, Any]) -> Any:
    where: Any = importlib.import_module("trl.experimental.orpo" if objective == "orpo" else "trl")
    name = objective.upper()
    settings = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    if objective == "dpo":
        settings |= {"router_aux_loss_coef": 0.0}
    elif objective == "kto":
        settings |= {"router_aux_loss_coef": 0.0, "per_device_train_batch_size": len(LABELED)}
    args = getattr(where, f"{name}Config")(str(folder), **settings | arguments)
    return getattr(where, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(LABELED if objective == "kto" else PAIRS),
        processing_class=AutoTokenizer.from_pretrained(ASSETS),
    )


def randomize(model: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".ref." not in name:
                parameter.normal_(std=0.1)


def rows_of(trainer: Any, objective: str) -> list[dict[str, Any]]:
    """TRL's tokens as the data room hands them on."""
    if objective != "orpo":
        return [dict(row) for row in trainer.train_dataset]
    return [
        {
            "prompt_ids": row["prompt_input_ids"],
            **{f"{way}_ids": row[f"{way}_input_ids"][len(row["prompt_input_ids"]) :] for way in ("chosen", "rejected")},
        }
        for row in trainer.train_dataset
    ]


@pytest.mark.parametrize(
    "case",
    [case if case in ("dpo sigmoid", "kto", "orpo") else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_loss_gradients_and_figures_are_those_of_trl(case: str, model: Any, tmp_path: Path) -> None:
    objective, arguments = CASES[case]
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    args = loss_arguments(arguments, objective)
    trainer = trl_trainer(objective, model, tmp_path, arguments)
    values = {"model": "m", "output_dir": "o", "objective": objective, "data": {"train": "t"}, "training": arguments}
    preference = Preference(parse_config(values), model, args, Reference(model, keeps_start=False))
    randomize(model)
    rows = rows_of(trainer, objective)

    model.train()
    expected = trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset))))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    batch = preference.collator(rows)
    loss = preference.loss(batch, len(rows), lambda: None)
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert any(its is not None and its.any() for its in theirs)
    for mine, its in zip(ours, theirs, strict=True):
        if its is None or not its.any():  # of an expert without a token
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-4 * float(its.abs().max()))
    figures = preference.figures.take()
    stored = trainer._stored_metrics["train"] if objective == "orpo" else trainer._metrics["train"]
    assert {"rewards/chosen", "rewards/margins", "logps/rejected"} <= figures.keys()
    assert figures == pytest.approx({name: stored[name][-1] for name in figures}, abs=1e-4)


def test_evaluation_watches_the_answers_and_not_the_exchanged_ones_and_padding_is_no_sequence(model: Any) -> None:
    config = parse_config(
        {"model": "m", "output_dir": "o", "objective": "kto", "data": {"train": "t", "packing": "padded"}}
    )
    preference = Preference(config, model, loss_arguments({}, "kto"), Reference(model, keeps_start=False))
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "KL_completion_ids": [4], "label": True},
        {"prompt_ids": [6], "completion_ids": [4], "KL_completion_ids": [7, 8, 9], "label": False},
    ]
    seen = []
    batch = preference.collator(rows)
    preference.evaluated(batch, lambda inputs: seen.append(inputs) or nullcontext())
    (inputs,) = seen
    assert inputs["input_ids"] is batch["input_ids"]
    lengths = sequence_lengths(inputs["input_ids"].shape, inputs["position_ids"], inputs["attention_mask"])
    assert lengths[inputs["attention_mask"].bool()].tolist() == [5] * 5 + [2] * 2


def test_micro_batch_is_whole_where_the_model_adds_its_router_loss(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "output_router_logits", True)
    values = {"model": "m", "output_dir": "o", "objective": "dpo", "data": {"train": "t"}}

    def reason(**training: Any) -> str | None:
        config = parse_config(values | {"training": training})
        args = loss_arguments(training, "dpo")
        return Preference(config, model, args, Reference(model, keeps_start=False)).why_indivisible(4)

    assert "output_router_logits" in (reason() or "")
    assert reason(router_aux_loss_coef=0.0) is None
