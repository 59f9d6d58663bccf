"""Routers' auxiliary losses of a step: those of transformers on one big batch, however the step is divided."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.experts.balance import RouterLosses
from expertune.run.record import RunRecord
from expertune.train.router import TrainsRouters
from expertune.train.trainer import ExpertTrainer
from tests.tiny_models import FolderOf, load_tiny
from tests.train.scarce import ONE_SEQUENCE, Scarce, adapter_bytes, run

AUX = 0.5
"""Far more than is usual, so that it decides the gradients."""


def of_run(values: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[RunRecord, Any]:
    """A run of two steps, and the gradients of the first."""
    gradients: dict[str, torch.Tensor] = {}
    real = ExpertTrainer._get_grad_norm

    def keep(self: Any, model: Any, grad_norm: Any = None) -> Any:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, parameter.grad.clone())
        return real(self, model, grad_norm)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertTrainer, "_get_grad_norm", keep)
        return run(copy.deepcopy(values), out, **changes), gradients


@pytest.fixture
def router_values(run_values: dict[str, Any]) -> dict[str, Any]:
    run_values["lora"] |= {"targets": ["attention", "experts", "router"]}
    run_values["training"] |= {"max_steps": 2, "eval_strategy": "no", "max_grad_norm": 0}
    run_values["router"] = {"aux_loss": AUX, "z_loss": 0.1}
    return run_values


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3_moe", "olmoe"))]
)
def test_losses_and_their_gradients_are_those_of_transformers_on_real_tokens(
    family: str, family_folder: FolderOf
) -> None:
    model = load_tiny(family_folder(family)).model.train()
    embedding = model.get_input_embeddings().weight.requires_grad_()
    ids = torch.randint(3, 96, (3, 16))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :9] = 0
    losses = RouterLosses(model, aux_loss=1.0, z_loss=1.0)
    with losses.watching(mask) as routed:
        outputs = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    found = losses.of(routed, routed.totals)
    config = model.config
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    wanted = load_balancing_loss_func(outputs.router_logits, num_experts, config.num_experts_per_tok, mask)
    squares = torch.cat([logits[mask.flatten() == 1].float() for logits in outputs.router_logits]).logsumexp(-1) ** 2
    for ours, theirs in ((found["router_aux_loss"], wanted), (found["router_z_loss"], squares.mean())):
        assert torch.allclose(ours, theirs, rtol=1e-5)
        one, other = (torch.autograd.grad(loss, embedding, retain_graph=True)[0] for loss in (ours, theirs))
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()))


def assert_same_step(found: tuple[RunRecord, Any], big: tuple[RunRecord, Any]) -> None:
    for name in ("router_aux_loss", "router_z_loss", "loss"):
        assert found[0]["train"][name][0][1] == pytest.approx(big[0]["train"][name][0][1], rel=1e-5)
    assert found[1].keys() == big[1].keys()
    for name, gradient in big[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


@pytest.fixture
def big(router_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunRecord, Any]:
    """A step of four examples as one batch."""
    router_values["lora"]["dropout"] = 0.0
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return of_run(router_values, tmp_path / "big", monkeypatch, training=training)


def test_micro_batches_and_parts_of_them_give_the_step_of_one_big_batch(
    big: tuple[RunRecord, Any], router_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert big[0]["preflight"]["router"].keys() == {"router_aux_loss", "router_z_loss"}
    router_values["data"]["merge_accumulation"] = False
    assert_same_step(of_run(router_values, tmp_path / "accumulated", monkeypatch), big)
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    with monkeypatch.context() as patch:
        scarce = Scarce(ONE_SEQUENCE, first_layer=2).install(patch)
        assert_same_step(of_run(router_values, tmp_path / "parts", monkeypatch, training=training), big)
    assert scarce.num_failures


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_padding_counts_for_nothing(
    packing: str,
    big: tuple[RunRecord, Any],
    router_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router_values["data"]["packing"] = packing
    if packing == "packed":
        router_values["data"]["max_length"] = 32
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    whole = of_run(router_values, tmp_path / "whole", monkeypatch, training=training)
    if packing == "padded":
        assert_same_step(whole, big)
    router_values["data"]["merge_accumulation"] = False
    assert_same_step(of_run(router_values, tmp_path / "accumulated", monkeypatch), whole)


@pytest.mark.slow
def test_dropout_drops_alike_while_a_step_is_counted_and_a_run_resumes_exactly(
    router_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router_values["data"]["merge_accumulation"] = False
    router_values["lora"]["dropout"] = 0.5
    counted: list[list[float]] = []
    real = TrainsRouters._count_here

    def keep(self: Any, model: Any) -> Any:
        totals = real(self, model)
        counted.append(totals.counts_E.tolist())
        return totals

    monkeypatch.setattr(TrainsRouters, "_count_here", keep)
    out = tmp_path / "run"
    record = run(router_values, out, training={"save_steps": 1})
    layers = record["train"]["expert_tokens"]["counts"].values()
    trained = [[sum(experts) for experts in zip(*of_step, strict=True)] for of_step in zip(*layers, strict=True)]
    assert counted == trained
    whole = adapter_bytes(out)
    for late in ("adapter", "checkpoint-2"):
        shutil.rmtree(out / late)
    run(router_values, out, resume=True, training={"save_steps": 1})
    assert adapter_bytes(out) == whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"aux_loss": -0.1}, "router.aux_loss: wanted is auto, or a number of at least 0 and at most 1,000, got -0.1"),
        (
            {"aux_loss": float("nan")},
            "router.aux_loss: wanted is auto, or a number of at least 0 and at most 1,000, got nan",
        ),
        ({"aux_loss": 1e30}, "router.aux_loss: wanted is auto, or a number of at least 0 and at most 1,000, got 1e"),
        ({"z_loss": 1e300}, "router.z_loss: has to be at most 1,000, got 1e"),
        ({"z_loss": -1}, "router.z_loss: has to be at least 0, got -1"),
        ({"z_loss": float("inf")}, "router.z_loss: .*finite number, got inf"),
        ({"aux_loss": "on"}, "router.aux_loss: wanted is auto, or a number of at least 0 and at most 1,000, got 'on'"),
        ({"aux": 1}, "unknown key router.aux"),
    ],
)
def test_wrong_coefficients_are_refused(keys: dict[str, Any], message: str, run_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(run_values | {"router": keys})
