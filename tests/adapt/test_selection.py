"""Adapters on some of a layer's experts: which are selected, and that files and exports of such adapters are right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expertune.adapt.factors import read_factors
from expertune.adapt.file_layout import SPARSE
from expertune.adapt.files import read_adapter
from expertune.adapt.selection import Scores, score_experts
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.targets import most_selected
from expertune.config import LoraSection
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.lora import ExpertsLora
from tests.adapt.conftest import WEIGHTS, Load, Stock, adapt, adopt, logits_of, stock_peft, train_a_little

LAYERS = {"model.layers.0.mlp.experts": [2], "model.layers.1.mlp.experts": [3, 0]}


def every_layer(*experts: int) -> dict[str, list[int]]:
    return {name: list(experts) for name in LAYERS}


ALL = every_layer(2, 0, 3, 1)


def section(share: float = 0.3, select: str = "load", **lora: Any) -> LoraSection:
    return LoraSection.model_validate({"experts": {"select": select, "share": share}} | lora)


def selected(scores: Scores, lora: LoraSection) -> list[int]:
    return scores.select(lora).section.layers["experts"]


def test_as_few_experts_as_have_the_share_are_selected_the_highest_first() -> None:
    scores = Scores(50, {"experts": [10, 40, 20, 30]}, {"experts": [26.0, 4.0, 8.0, 12.0]})
    assert selected(scores, section(0.4)) == [1]
    assert selected(scores, section(0.41)) == [1, 3]
    assert selected(scores, section(1.0)) == [1, 3, 2, 0]
    assert selected(scores, section(0.5, "gate")) == [0]
    assert selected(scores, section(0.6, "gate")) == [0, 3]
    assert scores.select(section(0.5, "gate")).to_json()["load"] == {"experts": 0.1}


def test_experts_with_equal_scores_are_taken_in_their_order_and_unused_ones_last() -> None:
    scores = Scores(80, {"experts": [0, 40, 40, 40, 40]}, {})
    assert selected(scores, section(0.5)) == [1, 2]
    assert selected(scores, section(1.0)) == [1, 2, 3, 4]
    assert selected(scores, LoraSection(expert_rank="load")) == [1, 2, 3, 4, 0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64), st.floats(0.01, 1.0))
def test_plan_knows_the_most_experts_that_can_be_selected(load: list[int], share: float) -> None:
    load[0] += 8 * len(load)
    chosen = selected(Scores(1, {"experts": load}, {}), section(share))
    assert 1 <= len(chosen) <= most_selected(len(load), share)
    assert sum(load[expert] for expert in chosen) >= share * sum(load) * (1 - 1e-9)


def test_too_few_tokens_to_score_the_experts_by_are_an_error() -> None:
    with pytest.raises(ConfigError, match="8 experts of layer were sent 63 tokens of the training examples, and 64"):
        Scores(32, {"layer": [63, *[0] * 7]}, {}).select(section())


def test_scores_are_of_tokens_that_are_no_padding(loaded: LoadedModel, ids: torch.Tensor) -> None:
    whole = score_experts(loaded.model, [{"input_ids": ids}])
    assert (whole.tokens, whole.load.keys()) == (48, LAYERS.keys())
    assert all(sum(load) == 96 for load in whole.load.values())  # two experts for each token
    assert all(sum(gate) == pytest.approx(48) for gate in whole.gate.values())
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    padded = score_experts(loaded.model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded.tokens == 36
    assert all(sum(load) == 72 for load in padded.load.values())


def test_only_selected_experts_have_factors_and_files_hold_no_others(loaded: LoadedModel, tmp_path: Path) -> None:
    model = adapt(loaded, experts={"layers": LAYERS})
    layers = [each for each in model.modules() if isinstance(each, ExpertsLora)]
    assert [tuple(each.lora_A["default"]["gate"].shape) for each in layers] == [(1, 4, 64), (2, 4, 64)]
    assert model.stock_layout().refusal == SPARSE
    model.save_pretrained(str(tmp_path))
    held = {key.partition(".mlp.")[0].partition(".block_sparse_moe.experts.")[2].partition(".")[0]: key
            for key in load_file(tmp_path / WEIGHTS) if "experts" in key}  # fmt: skip
    assert held.keys() == {"2", "3", "0"}


def test_adapter_on_some_experts_comes_back_whole(load: Load, ids: torch.Tensor, tmp_path: Path) -> None:
    model = adapt(load(), experts={"share": 0.3, "layers": LAYERS}, alpha=6, targets=["experts"])
    train_a_little(model)
    expected = logits_of(model, ids)
    model.save_pretrained(str(tmp_path / "saved"))
    model.save_live_factors(tmp_path / "saved")  # a scale of 1.5 does not come back from B to the bit
    again = adopt(load(), tmp_path / "saved")
    assert torch.equal(logits_of(again, ids), expected)
    again.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
    # Into the adapter of a run that goes on.
    train_a_little(model, seed=2)
    model.load_adapter(str(tmp_path / "saved"), "default")
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_stock_peft_computes_the_same_with_experts_of_three_ranks(
    family: str, load: Load, stock: Stock, ids: torch.Tensor, tmp_path: Path
) -> None:
    layers = {name: [2, 0, 3, 1] for name in load(family).names.specs}
    model = adapt(load(family), expert_rank="load", experts={"share": 1, "layers": layers}, targets=["experts"])
    layer = next(each for each in model.modules() if isinstance(each, ExpertsLora))
    held = {name: (tuple(factor.shape[:2]), layer.experts_of("default", name))
            for name, factor in layer.lora_A["default"].items() if name.startswith("down")}  # fmt: skip
    assert held == {"down": ((1, 4), (0,)), "down@1": ((1, 8), (2,)), "down@2": ((2, 2), (1, 3))}
    assert layer.scale("default", "down") * 4 == layer.scale("default", "down@1") * 8 == 8  # alpha
    same = adapt(load(family), targets=["experts"])
    assert model.get_nb_trainable_parameters() == same.get_nb_trainable_parameters()
    train_a_little(model)
    expected = logits_of(model, ids)
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(logits_of(stock_peft(stock(family), tmp_path), ids), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits_of(adopt(load(family), tmp_path), ids), expected, atol=1e-6, rtol=0)


def test_scaled_rank_is_divided_by_the_experts_of_a_token_and_alpha_stays(
    load: Load, stock: Stock, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = adapt(load(), r=8, alpha=16, expert_rank="scaled", targets=["attention", "experts"])
    layer = next(each for each in model.modules() if isinstance(each, ExpertsLora))
    assert (layer.ranks["default"]["up"], layer.scale("default", "up")) == ((4, 16.0), 4.0)
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").r["default"] == 8
    train_a_little(model)
    expected = logits_of(model, ids)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits_of(adopt(load(), tmp_path), ids), expected)
    torch.testing.assert_close(logits_of(stock_peft(stock(), tmp_path), ids), expected, atol=2e-5, rtol=0)
    single = adapt(load(), r=1, expert_rank="scaled", targets=["experts"])
    assert next(each for each in single.modules() if isinstance(each, ExpertsLora)).ranks["default"]["up"][0] == 1


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["attention"]}, "lora.targets names none of them .attention.; add experts"),
        ({"experts": {"share": 0.3}}, "found by a pass over training examples, which a run makes"),
        ({"experts": {"share": 0.3, "layers": {"model.layers.0.mlp.experts": [0]}}}, "layers.1.mlp.experts is missing"),
        ({"experts": {"share": 0.3, "layers": {**LAYERS, "h.0": [0]}}}, "h.0 is no layer of experts of this model"),
        ({"experts": {"share": 0.3, "layers": every_layer(4)}}, r"has experts 0 to 3; \[4\] are not some"),
        ({"experts": {"share": 0.3, "layers": every_layer()}}, r"\[\] are not some of these"),
    ],
)
def test_selection_that_cannot_be_is_refused(loaded: LoadedModel, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(loaded, **{"experts": {"share": 0.3, "layers": LAYERS}} | lora)


def test_adapter_to_start_from_keeps_its_own_experts(load: Load, saved: Path, tmp_path: Path) -> None:
    adapt(load(), experts={"share": 0.3, "layers": LAYERS}).save_pretrained(str(tmp_path / "some"))
    for folder in (saved, tmp_path / "some"):
        with pytest.raises(ConfigError, match=r"^lora\.experts is \{\"share\": 0\.3, .*; remove the key to take the"):
            adopt(load(), folder, experts={"share": 0.3, "layers": every_layer(1)})


def test_missing_and_odd_experts_of_a_selection_are_told(load: Load, tmp_path: Path) -> None:
    model = adapt(load(), experts={"share": 0.3, "layers": LAYERS}, targets=["experts"])
    model.save_pretrained(str(tmp_path))
    file = read_adapter(tmp_path)
    factors = read_factors(file.config, file.tensors, model.names, "here", file.selected)
    gate = factors.experts["model.layers.1.mlp.experts"]["gate"]
    assert [bool(pair.a.any()) for pair in gate] == [True, False, False, True]
    for layers, message in (
        (ALL, "has no adapter, though others"),
        ({**LAYERS, next(iter(LAYERS)): [1]}, "experts.1.w1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_factors(file.config, file.tensors, model.names, "here", layers)
    with pytest.raises(CheckpointError, match="has no adapter, though others of its layer have"):
        read_factors(file.config, file.tensors, model.names, "here")


def test_damaged_selection_in_a_file_is_an_error_that_names_it(saved: Path) -> None:
    with safe_open(saved / WEIGHTS, framework="pt") as held:
        settings = json.loads(held.metadata()["expertune.lora"])
    settings["experts"] = {"share": 0.2, "layers": {"x": ["y"]}}
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, {"expertune.lora": json.dumps(settings)})
    with pytest.raises(CheckpointError, match=r"its settings are damaged at experts\.layers\.x\.0"):
        read_adapter(saved)
