"""DoRA on experts and linears: PEFT's arithmetic, PEFT's names in files."""

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection
from expertune.errors import CheckpointError, ConfigError
from expertune.experts import dora as dora_module
from expertune.experts.lora import ExpertsLora
from tests.adapt.conftest import WEIGHTS, Load, adapt, adopt, config_of, logits_of, train_a_little
from tests.experts.test_lora import config_of as live_config
from tests.experts.test_lora import filled_experts, inputs

LIVE = "base_model.model.model.layers.1.mlp.experts"
RANKS = {"gate": (4, 8.0), "up": (2, 8.0), "down": (4, 3.0)}
LAYER = "base_model.model.model.layers.1.block_sparse_moe"


def layer_with_dora() -> ExpertsLora:
    config = live_config(RANKS)
    config.use_dora = True
    return ExpertsLora(filled_experts(), "default", config, target_name="layers.0.experts")


def separate(layer: ExpertsLora) -> PeftModel:
    """The same experts as dense linears under stock PEFT's DoRA."""
    experts, held = layer.base_layer, nn.ModuleDict()
    for expert in range(experts.num_experts):
        for projection in experts.spec.projections:
            rows, columns = experts.spec.shape(projection)
            linear = nn.Linear(columns, rows, bias=False)
            linear.weight.data = experts.dequantize(expert, projection, torch.float32)
            held[f"{expert}_{projection}"] = linear
    alphas = {f".*_{name}": alpha for name, (_, alpha) in RANKS.items()}
    ranks = {f".*_{name}": rank for name, (rank, _) in RANKS.items()}
    config = LoraConfig(use_dora=True, target_modules=list(held), rank_pattern=ranks, alpha_pattern=alphas)
    model = peft.get_peft_model(held, config)
    for name, module in model.base_model.model.items():
        expert, projection = name.split("_")
        module.lora_A["default"].weight.data = layer.lora_A["default"][projection][int(expert)].detach().clone()
        module.lora_B["default"].weight.data = layer.lora_B["default"][projection][int(expert)].detach().clone()
        magnitudes = layer.lora_magnitude_vector["default"][projection]
        module.lora_magnitude_vector["default"].weight.data = magnitudes[int(expert)].detach().clone()
    return model


def forward(model: PeftModel, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    experts, rows = model.base_model.model, []
    for token, chosen in enumerate(index.tolist()):
        each = []
        for choice, expert in enumerate(chosen):
            gate, up = (experts[f"{expert}_{part}"](hidden[token : token + 1]) for part in ("gate", "up"))
            each.append(weights[token, choice] * experts[f"{expert}_down"](nn.functional.silu(gate) * up))
        rows.append(torch.cat(each).sum(dim=0))
    return torch.stack(rows)


def test_dora_on_experts_is_that_of_stock_peft_on_separate_linears_forward_and_backward() -> None:
    layer = layer_with_dora()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter *= torch.rand_like(parameter) + 0.5
    stock = separate(layer)
    hidden, index, weights = inputs()
    mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    output, expected = layer(mine, index, weights), forward(stock, theirs, index, weights)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for name, module in stock.base_model.model.items():
        expert, projection = name.split("_")
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            wanted = getattr(module, kind)["default"].weight.grad
            gradient = getattr(layer, kind)["default"][projection].grad[int(expert)]
            wanted = torch.zeros_like(gradient) if wanted is None else wanted
            size = max(float(wanted.abs().max()), 1.0)
            torch.testing.assert_close(gradient / size, wanted / size, rtol=1e-4, atol=1e-5)


def test_new_adapter_with_dora_computes_what_the_base_does() -> None:
    layer = layer_with_dora()
    batch = inputs()
    torch.testing.assert_close(layer(*batch), layer.base_layer(*batch), rtol=1e-5, atol=1e-5)


def test_norms_follow_every_change_of_a_factor_whatever_changed_it() -> None:
    layer = layer_with_dora()
    batch, seen = inputs(), []
    for change in (lambda b: None, lambda b: b.data.normal_(), lambda b: b.detach().numpy().__imul__(2)):
        change(layer.lora_B["default"]["gate"])
        output = layer(*batch)
        again = copy.deepcopy(layer)
        again.norms._known.clear()
        assert torch.equal(output, again(*batch))
        seen.append(output)
    assert not torch.equal(seen[1], seen[2])


def test_norms_of_the_trained_adapter_and_of_the_reference_are_both_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = layer_with_dora(), inputs()
    factor, computed = layer.lora_B["default"]["gate"], []
    row_norms = dora_module.row_norms
    monkeypatch.setattr(dora_module, "row_norms", lambda *args: computed.append(1) or row_norms(*args))
    reference = factor.detach().clone()
    for step in range(3):
        trained = reference + 1 + step
        for _micro_batch in range(4):
            for state in (trained, reference):
                factor.data.copy_(state)
                layer(*batch)
    assert len(computed) == 3  # of the trained adapter in each step; the magnitudes began with those of the reference


def test_factors_are_read_once_while_an_answer_is_written_and_changes_that_torch_notes_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, batch, read = layer_with_dora(), inputs(), []
    checksum = dora_module._checksum
    monkeypatch.setattr(dora_module, "_checksum", lambda factor: read.append(1) or checksum(factor))
    factor = layer.lora_B["default"]["gate"]
    optimizer = torch.optim.SGD([factor], lr=1.0)

    def step() -> None:
        factor.grad = torch.ones_like(factor)
        optimizer.step()

    def load() -> None:
        layer.load_state_dict({name: each * 1.5 for name, each in layer.state_dict().items()})

    with torch.no_grad(), layer.norms.looked_at_once():
        for change in (step, load, lambda: factor.copy_(torch.full_like(factor, 0.3))):
            change()
            outputs = [layer(*batch) for _token in range(3)]
            read.clear()
            assert torch.equal(layer(*batch), outputs[0])
            assert not read
            again = copy.deepcopy(layer)
            again.norms._known.clear()
            assert torch.equal(outputs[0], again(*batch))
    factor.data.normal_()
    assert not torch.equal(layer(*batch), outputs[0])  # afterwards what torch does not note is seen too


def test_of_two_answers_at_once_the_one_that_ends_first_leaves_the_others_look_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, batch, read = layer_with_dora(), inputs(), []
    checksum = dora_module._checksum
    monkeypatch.setattr(dora_module, "_checksum", lambda factor: read.append(1) or checksum(factor))
    first, second = layer.norms.looked_at_once(), layer.norms.looked_at_once()
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        layer(*batch)
        read.clear()
        first.__exit__(None, None, None)
        layer(*batch)
        assert not read
        second.__exit__(None, None, None)
        layer(*batch)
        assert read


def test_two_active_adapters_are_refused_where_one_has_dora() -> None:
    layer = layer_with_dora()
    layer.update_layer("second", 4, 8, live_config(RANKS), target_name="layers.0.experts")
    layer.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="use_dora, which scales what all of them give; activate one at a time"):
        layer(*inputs())


def dora(loaded: LoadedModel, **lora: Any) -> ExpertPeftModel:
    model = adapt(loaded, use_dora=True, **lora)
    train_a_little(model)
    with torch.no_grad():  # positive, and of the size of norms
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.abs_().add_(1)
    return model


@pytest.fixture(scope="module")
def trained(load: Load) -> ExpertPeftModel:
    return dora(load(), rank_pattern={"w2": 2})


@pytest.fixture(scope="module")
def folder(trained: ExpertPeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dora")
    trained.save_pretrained(str(path))
    return path


def test_file_has_magnitudes_under_the_names_of_separate_linears(folder: Path, trained: ExpertPeftModel) -> None:
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    live = trained.get_submodule(LIVE).lora_magnitude_vector["default"]["gate"]
    assert torch.equal(tensors[f"{LAYER}.experts.2.w1.lora_magnitude_vector"], live[2])
    assert config["use_dora"] is True
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == 2 * (4 + 3 * 4) + 1


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
def test_stock_peft_reads_the_file_over_separate_linears(folder: Path, trained: ExpertPeftModel) -> None:
    tensors = load_file(folder / WEIGHTS)
    experts = trained.get_submodule(LIVE)
    dense = nn.Module()
    for key in tensors:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        if name in key and key.endswith("magnitude_vector"):
            *parents, leaf = name.split(".")
            here = dense
            for parent in parents:
                if parent not in here._modules:
                    here.add_module(parent, nn.Module())
                here = here._modules[parent]
            columns = tensors[f"base_model.model.{name}.lora_A.weight"].shape[1]
            here.add_module(leaf, nn.Linear(columns, len(tensors[key]), bias=False))
    w2 = dense.get_submodule(f"{LAYER.removeprefix('base_model.model.')}.experts.3.w2")
    w2.weight.data = experts.base_layer.dequantize(3, "down", torch.float32)
    values = {key: value for key, value in config_of(folder).items() if key not in ("peft_type", "auto_mapping")}
    config = LoraConfig(**values)
    model = PeftModel(dense, config)
    peft.set_peft_model_state_dict(model, tensors)
    merged = model.merge_and_unload().get_submodule(f"{LAYER.removeprefix('base_model.model.')}.experts.3.w2").weight
    scale, kind = experts.scale("default", "down"), "default"
    whole = experts.base_layer.dequantize(3, "down", torch.float32)
    whole = whole + scale * experts.lora_B[kind]["down"][3] @ experts.lora_A[kind]["down"][3]
    wanted = experts.lora_magnitude_vector[kind]["down"][3, :, None] * whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)


def test_file_gives_back_the_same_model(
    folder: Path, trained: ExpertPeftModel, load: Load, ids: Tensor, tmp_path: Path
) -> None:
    again = adopt(load(), folder)
    assert torch.equal(logits_of(again, ids), logits_of(trained, ids))
    with pytest.raises(ConfigError, match=r"lora\.use_dora is false, but the adapter at .* has true; remove the key"):
        adopt(load(), folder, use_dora=False)
    again.save_pretrained(str(tmp_path))
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_file_without_magnitudes_is_refused_by_name(folder: Path, load: Load, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    del tensors[f"{LAYER}.experts.2.w1.lora_magnitude_vector"]
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.lora_magnitude_vector"):
        adopt(load(), broken)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_own_calls_put_dora_on_experts_and_save_it(load: Load, ids: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["w1", "w3", "q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load().model, config)
    train_a_little(model)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load().model, tmp_path)
    torch.testing.assert_close(logits_of(again, ids), expected)


def test_router_is_refused_with_dora() -> None:
    with pytest.raises(ValueError, match="use_dora: PEFT has no DoRA on routers; leave router out"):
        LoraSection(use_dora=True, targets=["experts", "router"])
