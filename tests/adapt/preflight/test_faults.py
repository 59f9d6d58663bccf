"""The preflight check names what is wrong with each kind of sick model."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from expertune.adapt.attach import attach
from expertune.adapt.comparison import probe_logits
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection
from expertune.errors import ConfigError
from expertune.experts.lora import ExpertsLora
from expertune.experts.module import Nf4Experts
from tests.adapt.conftest import adapt
from tests.adapt.preflight.conftest import EXPERTS, batch_of, check, expect_failure, prepared
from tests.families.build import tiny_config
from tests.tiny_models import load_tiny, save_random, stock_model


def test_experts_left_in_sixteen_bits_are_named(mixtral: Path, loaded: LoadedModel) -> None:
    batch = batch_of()
    stock = stock_model(mixtral).get_submodule("model.layers.0.mlp.experts")
    base = probe_logits(loaded.model, batch)
    model = adapt(loaded, targets=["attention"])
    loaded.model.get_submodule("model.layers.0.mlp").experts = stock
    expect_failure(model, batch, base, r"layers\.0\.mlp\.experts\.gate_up_proj: experts are held as torch\.float32")


def test_model_without_any_four_bit_experts_is_told(mixtral: Path, loaded: LoadedModel) -> None:
    batch = batch_of()
    base = probe_logits(loaded.model, batch)
    model = adapt(loaded, targets=["attention"])
    for layer in range(2):
        loaded.model.get_submodule(f"model.layers.{layer}.mlp").experts = nn.Identity()
    expect_failure(model, batch, base, "no 4-bit experts in the model")


def test_linear_whose_weight_was_unpacked_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch, targets=["experts"])
    linear = loaded.model.get_submodule("model.layers.1.self_attn.k_proj")
    linear.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)
    expect_failure(model, batch, base, r"layers\.1\.self_attn\.k_proj: the weight is torch\.float32, not packed")


def test_convolution_beside_the_experts_is_no_expert(loaded: LoadedModel) -> None:
    """Hybrid models have three-dimensional convolution kernels in 16 bits, and rightly so."""
    batch = batch_of()
    model, base = prepared(loaded, batch)
    loaded.model.get_submodule("model.layers.0").conv1d = nn.Conv1d(64, 64, 4)
    assert check(model, batch, base)["passed"]


def experts_layer(loaded: LoadedModel) -> ExpertsLora:
    layer = loaded.model.get_submodule(EXPERTS)
    assert isinstance(layer, ExpertsLora)
    return layer


def test_factor_that_is_cut_from_the_graph_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    layer = experts_layer(loaded)
    cut = layer.lora_A["default"]["up"].detach().clone()

    class Detached(nn.ParameterDict):
        def __getitem__(self, key: str) -> Any:
            return cut if key == "up" else super().__getitem__(key)

    layer.lora_A["default"].__class__ = Detached
    expect_failure(model, batch, base, rf"{EXPERTS}: expert \d, up, lora_A: the gradient is missing")


def test_factor_of_an_attention_linear_that_is_cut_from_the_graph_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    linear = loaded.model.get_submodule("model.layers.0.self_attn.q_proj").lora_B["default"]
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.detach())
    expect_failure(model, batch, base, r"layers\.0\.self_attn\.q_proj\.lora_B: the gradient is missing")


@pytest.mark.parametrize(
    ("kind", "target", "module"),
    [
        ("jamba", "dt_proj", r"mamba\.dt_proj"),  # its weight is taken, it is never called
        ("deepseek_v32", "wq_b", r"indexer\.wq_b"),  # picks tokens, without a gradient
        ("ernie4_5_vl_moe", "gate_proj", r"vision_moe\.experts"),  # experts for pictures
    ],
)
def test_target_that_no_text_trains_is_an_error_of_the_run_file(
    kind: str, target: str, module: str, tmp_path: Path
) -> None:
    loaded = load_tiny(save_random(tmp_path, tiny_config(kind)))
    ids = torch.randint(3, 60, (2, 16))
    batch = {"input_ids": ids, "labels": ids.clone()}
    base = probe_logits(loaded.model, batch)
    model = attach(loaded, LoraSection(r=2, dropout=0.0, targets=["experts", target]), str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^lora\.targets: no adapter can learn in model\.\S*{module}: .*Leave "):
        check(model, batch, base)


def test_router_whose_choice_has_no_gradient_is_told_with_what_to_do(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    experts_layer(loaded).set_scale("default", 0.0)
    expect_failure(model, batch, base, r"zero everywhere.* for a router .*leave router out of lora\.targets, or give")


def test_expert_adapter_whose_output_is_dropped_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    layer = experts_layer(loaded)
    layer.forward = types.MethodType(lambda self, *inputs: self.base_layer(*inputs), layer)
    expect_failure(model, batch, base, rf"{EXPERTS}: expert \d, \w+, lora_A: the gradient is missing")


def test_experts_that_the_forward_goes_around_are_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    layer = experts_layer(loaded)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapted = layer

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.adapted.base_layer(*inputs)

    loaded.model.get_submodule("model.layers.1.mlp").experts = Around()
    expect_failure(model, batch, base, rf"{EXPERTS}\.adapted: the forward never passes through these experts")


def test_expert_whose_scale_is_zero_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    experts_layer(loaded).set_scale("default", 0.0)
    expect_failure(model, batch, base, rf"{EXPERTS}: expert \d, \w+, lora_\w: the gradient is zero everywhere")


def test_gradient_that_is_not_finite_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    with torch.no_grad():
        experts_layer(loaded).lora_A["default"]["down"].fill_(torch.inf)
    expect_failure(model, batch, base, "the gradient is not finite")


def test_adapter_on_modules_that_are_never_used_is_told(loaded: LoadedModel) -> None:
    """All adapters switched off behind PEFT's back: what is attached, changes nothing."""
    batch = batch_of()
    model, base = prepared(loaded, batch)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._disable_adapters = True
    expect_failure(model, batch, base, "no factor of the adapter takes part in the loss")


def test_adapter_that_takes_part_in_training_alone_is_told(loaded: LoadedModel) -> None:
    """Factors that learn, in a model that generates what the base would."""
    batch = batch_of()
    model, base = prepared(loaded, batch)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            adapted = module.forward
            module.forward = lambda *inputs, layer=module, adapted=adapted: (
                adapted(*inputs) if layer.training else layer.base_layer(*inputs)
            )
    expect_failure(model, batch, base, "a non-zero adapter does not change the logits")


def test_adapter_whose_change_cancels_in_the_last_token_has_an_effect(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    last = base[:, -1].clone()

    def cancel(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            output.logits[:, -1] = last

    loaded.model.register_forward_hook(cancel)
    assert check(model, batch, base)["effective"]["largest_logit_change"] > 0


def test_base_that_changed_for_a_single_token_is_told(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)

    def change(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            output.logits[1, 3, 5] += 1e-3

    loaded.model.register_forward_hook(change)
    expect_failure(model, batch, base, r"logits differ from the base model's by up to 0\.001")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["mlp.experts", "self_attn.o_proj", "input_layernorm"])
def test_attaching_that_changes_the_base_in_one_layer_is_told(part: str, layer: int, loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    changed_part = loaded.model.get_submodule(f"model.layers.{layer}.{part}")
    changed_part = getattr(changed_part, "base_layer", changed_part)
    changed_part.register_forward_hook(lambda module, inputs, output: output * 1.001)
    expect_failure(model, batch, base, r"logits differ from the base model's by up to .*attaching .* changed the base")


@pytest.mark.parametrize("what", ["expert bytes", "expert scales", "a norm"])
def test_base_that_changed_after_attaching_is_told(what: str, loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    experts = experts_layer(loaded).base_layer
    assert isinstance(experts, Nf4Experts)
    with torch.no_grad():
        if what == "expert bytes":
            experts.down.packed ^= 0x11
        elif what == "expert scales":
            experts.down.offset.mul_(1.01)
        else:
            loaded.model.get_submodule("model.norm").weight.mul_(1.01)
    expect_failure(model, batch, base, r"logits differ from the base model's by up to .*attaching .* changed the base")


def test_forward_that_does_not_repeat_itself_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    experts = experts_layer(loaded).base_layer
    experts.register_forward_hook(lambda module, inputs, output: output + 1e-3 * torch.randn_like(output))
    expect_failure(model, batch, base, rf"two forwards .* differ by .*, from .*{EXPERTS}\S* on; .* not repeatable")


def test_ranks_that_need_each_other_in_a_forward_take_none_for_a_message(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("comparison", "preflight"):
        monkeypatch.setattr(f"expertune.adapt.{where}.in_lockstep", lambda model: True)
    monkeypatch.delattr("expertune.adapt.preflight.reachable_modules")
    monkeypatch.delattr("expertune.adapt.comparison._first_to_differ")
    batch = batch_of()
    model, base = prepared(loaded, batch)
    experts = experts_layer(loaded)
    handle = experts.register_forward_hook(lambda module, inputs, output: output + 1e-3 * torch.randn_like(output))
    expect_failure(model, batch, base, r"two forwards .* differ by up to [\d.e-]+; the model is not repeatable")
    handle.remove()
    experts.forward = types.MethodType(lambda self, *inputs: self.base_layer(*inputs), experts)
    expect_failure(model, batch, base, rf"{EXPERTS}: expert \d, \w+, lora_A: the gradient is missing")


def test_forward_that_drifts_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    norm = loaded.model.get_submodule("model.layers.1.input_layernorm")

    def drift(module: nn.Module, inputs: Any) -> None:
        module.weight.data.mul_(1.001)

    norm.register_forward_pre_hook(drift)
    expect_failure(model, batch, base, r"differ by .*, from .*layers\.1\.input_layernorm on")


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("part", ["layers.1.mlp.experts", "layers.0.self_attn.o_proj", "layers.1.input_layernorm"])
def test_module_that_computes_something_else_in_one_call_is_told(part: str, call: int, loaded: LoadedModel) -> None:
    """Whichever of the calls in evaluation it is."""
    batch = batch_of()
    model, base = prepared(loaded, batch, dropout=0.1)
    calls: list[nn.Module] = []

    def drift(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if module.training:
            return None
        calls.append(module)
        return output * 1.001 if len(calls) == call else None

    loaded.model.get_submodule(f"model.{part}").register_forward_hook(drift)
    found = "the model is not repeatable" if call < 3 else "changed the base"
    expect_failure(model, batch, base, found)


def test_module_that_adds_what_it_gave_before_is_told(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    held: list[Tensor] = []

    def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach())
        return output + 1e-3 * held[-2] if len(held) > 1 else output

    loaded.model.get_submodule("model.layers.1.post_attention_layernorm").register_forward_hook(mix)
    expect_failure(model, batch, base, "two forwards .* differ by|changed the base")


def test_dropout_that_drops_the_whole_update_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch, dropout=0.1)
    layer = experts_layer(loaded)
    updates = layer._updates
    layer._updates = lambda active: {} if layer.training else updates(active)
    expect_failure(model, batch, base, rf"{EXPERTS}: expert \d, \w+, lora_A: the gradient is missing")


def test_dropout_that_gives_no_number_is_named(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch, dropout=0.1)
    dropout = loaded.model.get_submodule("model.layers.0.self_attn.q_proj").lora_dropout["default"]
    dropout.register_forward_hook(lambda module, inputs, output: output / 0 if module.training else output)
    expect_failure(model, batch, base, "the gradient is not finite")
