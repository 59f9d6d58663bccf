"""Adapters that train from principal components (PiSSA), which are taken away from what they give."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from expertune.adapt.attach import attach
from expertune.adapt.first_factors import first_factors
from expertune.adapt.initial import begin_at_components, read_first_factors, write_first_factors
from expertune.adapt.live import LiveAdapter, LivePair
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection
from expertune.errors import CheckpointError, ExportError
from expertune.experts import layout
from expertune.kernels.lora import beyond
from tests.adapt.conftest import stock_peft
from tests.experts.families import from_matrices
from tests.tiny_models import copied, dequantized, load_tiny

IDS = torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(5))
# A scale of 3.5 does not come back from the adapter's files to the bit.
SETTINGS = {"r": 6, "alpha": 21.0, "targets": ["attention", "experts"], "rank_pattern": {"down_proj|w2": 3}}


@pytest.fixture(scope="module")
def folder(family_folder) -> Path:
    return family_folder("mixtral")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_tiny(folder)


def begun(loaded: LoadedModel, folder: Path, **settings: object) -> ExpertPeftModel:
    model = attach(copied(loaded), LoraSection(**{**SETTINGS, "init": "pissa", **settings}), str(folder)).eval()
    begin_at_components(model.get_base_model(), model.names, seed=0)
    return model


def pairs(model: ExpertPeftModel) -> list[LivePair]:
    return list(LiveAdapter(model.get_base_model(), model.names).pairs())


def trained(model: ExpertPeftModel, steps: int = 3) -> ExpertPeftModel:
    factors = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=3e-3)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def test_it_begins_as_the_base_to_the_bit_also_where_inputs_are_dropped(loaded: LoadedModel, folder: Path) -> None:
    base = logits(loaded.model)
    model = begun(loaded, folder, dropout=0.3)
    assert all(pair.b.any() for pair in pairs(model))
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.train()), base)
    trained(model).eval()
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dtype": "bfloat16"}])
def test_the_first_factors_are_the_best_of_their_rank_whatever_the_scale(
    loaded: LoadedModel, folder: Path, settings: dict[str, object]
) -> None:
    model = begun(loaded, folder, **settings)
    stock, found = dequantized(loaded, folder), pairs(model)
    assert len(found) == 2 * (4 + 3 * 4)
    for pair in found:
        if pair.projection is not None:
            continue
        matrix = stock.get_submodule(pair.module).weight.detach()
        product = pair.scale * (pair.b.float() @ pair.a.float()).detach()
        left = torch.linalg.vector_norm(matrix - product)
        torch.testing.assert_close(left, torch.linalg.svdvals(matrix)[len(pair.a) :].norm(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(pair.a.norm(dim=1), pair.b.norm(dim=0), rtol=1e-2, atol=1e-4)


def weights_of(
    model: ExpertPeftModel, stock: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Every adapted weight as PiSSA has it: what remains of it, and the product of the factors."""
    matrices, found = {}, {}
    for pair in pairs(model):
        layer = model.get_base_model().get_submodule(pair.module).get_base_layer()
        if pair.expert is None:
            matrix = stock.get_submodule(pair.module).weight.detach()
        else:
            matrix = layer.dequantize(pair.expert, pair.projection, torch.float32)
        assert pair.first is not None
        first_a, first_b = (each.double() for each in pair.first)
        remains = (matrix.double() - pair.scale * first_b @ first_a).float()
        a, b = factors[pair.name]
        matrices[pair.module, pair.expert, pair.projection] = remains + pair.scale * b @ a
    for name, spec in model.names.specs.items():
        for weight in spec.weight_names:
            projections = layout.fused_projections(spec, weight)
            of_experts = [[matrices[name, expert, each] for each in projections] for expert in range(spec.num_experts)]
            found[f"{name}.{weight}"] = torch.stack([from_matrices(spec, weight, each) for each in of_experts])
    return found | {f"{name}.weight": each for (name, expert, _), each in matrices.items() if expert is None}


@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_are_those_of_pissa_beside_what_remains_of_the_weights(
    loaded: LoadedModel, folder: Path, steps: int
) -> None:
    model, stock = trained(begun(loaded, folder), steps), dequantized(loaded, folder)
    factors = {
        pair.name: tuple(each.detach().clone().requires_grad_() for each in (pair.a, pair.b)) for pair in pairs(model)
    }
    weights = weights_of(model, stock, factors)
    expected = torch.func.functional_call(stock, weights, (), {"input_ids": IDS, "labels": IDS}).loss
    expected.backward()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    layers = dict(LiveAdapter(model.get_base_model(), model.names).layers)
    for pair in pairs(model):
        layer = layers[pair.module]
        for which, reference in zip("AB", factors[pair.name], strict=True):
            held = getattr(layer, f"lora_{which}")["default"]
            found = held.weight.grad if pair.expert is None else held[pair.projection].grad[pair.expert]
            scale = float(reference.grad.abs().max())
            torch.testing.assert_close(found, reference.grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-3))


def test_a_linear_trains_as_pefts_own_pissa_does(loaded: LoadedModel, folder: Path) -> None:
    model, name = begun(loaded, folder), "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    plain[0].weight.data.copy_(dequantized(loaded, folder).get_submodule(name).weight)
    theirs = get_peft_model(plain, LoraConfig(r=6, lora_alpha=21.0, target_modules=["0"], init_lora_weights="pissa"))
    x, wanted = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).unbind()
    for each in (layer, theirs):
        optimizer = torch.optim.Adam([factor for factor in each.parameters() if factor.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (each(x) - wanted).square().mean().backward()
            optimizer.step()
    assert not torch.allclose(layer(x), layer.base_layer(x), atol=0.1)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v2"])
def test_its_files_are_an_ordinary_adapter_of_twice_the_rank(family: str, family_folder, tmp_path: Path) -> None:
    folder = family_folder(family)
    loaded = load_tiny(folder)
    model = trained(begun(loaded, folder, rank_pattern={})).eval()
    model.save_pretrained(str(tmp_path))
    model.save_live_factors(tmp_path)
    ordinary = attach(copied(loaded), LoraSection(init_from=str(tmp_path)), str(folder)).eval()
    assert not list(first_factors(ordinary.get_base_model()))
    torch.testing.assert_close(logits(ordinary), logits(model), rtol=0, atol=0)
    for mine, theirs in zip(pairs(model), pairs(ordinary), strict=True):
        assert len(theirs.a) == 2 * len(mine.a)
        assert theirs.scale == pytest.approx(mine.scale)
    if model.stock_layout().refusal is None:
        stock = stock_peft(dequantized(loaded, folder), tmp_path).eval()
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_come_back_to_the_bit_from_its_files_and_its_first_factors(
    dtype: str, loaded: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    model = begun(loaded, folder, dtype=dtype)
    write_first_factors(tmp_path / "first", model.get_base_model(), model.names)
    trained(model)
    model.save_pretrained(str(tmp_path))
    model.save_live_factors(tmp_path)
    again = attach(copied(loaded), LoraSection(**SETTINGS, init="pissa", dtype=dtype), str(folder)).eval()
    with pytest.raises(CheckpointError, match="whose adapter began with other factors"):
        again.load_adapter(str(tmp_path), "default")
    read_first_factors(tmp_path / "first", again.get_base_model(), again.names)
    assert torch.equal(logits(again), logits(loaded.model))
    again.load_adapter(str(tmp_path), "default")
    for (name, one), (_, other) in zip(states(model), states(again), strict=True):
        assert torch.equal(one, other), name


def test_what_peft_merges_is_what_the_adapter_gives(loaded: LoadedModel, folder: Path) -> None:
    model = trained(begun(loaded, folder)).eval()
    linears = [pair for pair in pairs(model) if pair.expert is None]
    assert len(linears) == 2 * 4
    for pair in linears:
        layer, x = model.get_base_model().get_submodule(pair.module), torch.eye(pair.a.shape[1])
        given = (layer(x) - layer.base_layer(x)).T
        assert given.any()
        torch.testing.assert_close(layer.get_delta_weight("default"), given, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations")
def test_merging_an_adapter_that_gives_nothing_does_what_merging_zeros_does(loaded: LoadedModel, folder: Path) -> None:
    model = begun(loaded, folder, targets=["attention"], rank_pattern={})
    plain = attach(copied(loaded), LoraSection(r=6, targets=["attention"]), str(folder)).eval()
    assert torch.equal(logits(model.merge_and_unload()), logits(plain.merge_and_unload()))


def test_a_copied_model_merges_its_own_factors(loaded: LoadedModel, folder: Path) -> None:
    model = begun(loaded, folder, targets=["attention"], rank_pattern={})
    again = trained(copy.deepcopy(model))
    name = "model.layers.0.self_attn.q_proj"
    assert not model.get_base_model().get_submodule(name).get_delta_weight("default").any()
    assert again.get_base_model().get_submodule(name).get_delta_weight("default").any()


def test_its_factors_are_not_mixed_as_if_they_were_what_it_gives(loaded: LoadedModel, folder: Path) -> None:
    model = begun(loaded, folder, targets=["attention"], rank_pattern={})
    with pytest.raises(ExportError, match=r"add_weighted_adapter would mix .*'default' without taking away"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")
    assert "half" not in model.peft_config


def test_other_adapters_beside_it_are_merged_as_ever(loaded: LoadedModel, folder: Path) -> None:
    model = begun(loaded, folder, targets=["attention"], rank_pattern={})
    attach(loaded, LoraSection(r=4, targets=["attention"]), str(folder), adapter_name="second", onto=model)
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A["second"].weight, layer.lora_B["second"].weight
    torch.nn.init.normal_(b)
    torch.testing.assert_close(layer.get_delta_weight("second"), layer.scaling["second"] * b @ a)


def states(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((str(number), first) for number, (_, first) in enumerate(first_factors(model)))


def test_first_factors_of_another_run_are_refused(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    model = begun(loaded, folder)
    write_first_factors(tmp_path / "first", model.get_base_model(), model.names)
    other = begun(loaded, folder, r=4)
    with pytest.raises(CheckpointError, match=r"does not hold the first factors of .*it is of another run"):
        read_first_factors(tmp_path / "first", other.get_base_model(), other.names)
    (tmp_path / "first").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="first: damaged"):
        read_first_factors(tmp_path / "first", model.get_base_model(), model.names)


def test_the_difference_of_large_products_is_not_lost_in_16_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    first_a, first_b = torch.randn(8, 64, generator=generator), torch.randn(32, 8, generator=generator)
    a, b = (each + 1e-3 * torch.randn(each.shape, generator=generator) for each in (first_a, first_b))
    exact = b.double() @ a.double() - first_b.double() @ first_a.double()
    wide_a, wide_b = beyond(a, b, first_a, first_b)
    same_a, same_b = beyond(first_a, first_b, first_a, first_b)
    assert not (same_b @ same_a).any()
    torch.testing.assert_close(wide_b.double() @ wide_a.double(), exact, rtol=1e-4, atol=1e-6)
    rounded = wide_b.bfloat16().double() @ wide_a.bfloat16().double()
    plain = torch.cat([b, -first_b], 1).bfloat16().double() @ torch.cat([a, first_a]).bfloat16().double()
    assert (rounded - exact).norm() < 0.01 * exact.norm() < (plain - exact).norm()
