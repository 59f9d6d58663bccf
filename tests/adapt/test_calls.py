"""Calls of PEFT and transformers on an NF4 folder: adapters keep their experts, whoever puts them on."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.checkpoint.load import LoadedModel, auto_class
from expertune.errors import CheckpointError, ConfigError, ExportError
from expertune.experts.lora import ExpertsLora
from expertune.experts.module import Nf4Experts
from tests.adapt.conftest import FolderOf, adapt, logits_of, stock_peft, train_a_little
from tests.checkpoint.nf4_folders import quantized
from tests.families import build
from tests.tiny_models import changed, dequantized, frozen_bytes, load_tiny, random_rows, save_random

# PEFT asks transformers by a renamed property, and tells that a head among the targets is copied into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

ALL = ("gate", "up", "down")
QKV = {"q_proj", "k_proj", "v_proj"}


@pytest.fixture(scope="module")
def nf4_of(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = quantized(family_folder(family), tmp_path_factory.mktemp("nf4") / family)
        return folders[family]

    return folder_of


@pytest.fixture
def nf4(nf4_of: FolderOf) -> Path:
    return nf4_of("mixtral")


@pytest.fixture(scope="module")
def pristine(nf4_of: FolderOf) -> PreTrainedModel:
    return by_transformers(nf4_of("mixtral"))


@pytest.fixture
def model(pristine: PreTrainedModel) -> PreTrainedModel:
    """An NF4 folder as transformers loads it; of the test's own."""
    return copy.deepcopy(pristine)


def by_transformers(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["w1", "w2", "w3", "q_proj"]} | settings))


def experts_of(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Ranks of the adapters on experts, by module."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, ExpertsLora))
    return {name: layer.ranks[adapter] for name, layer in layers if adapter in layer.lora_A}


def linears_of(model: nn.Module, adapter: str = "default") -> set[str]:
    """Last parts of the names of everything else that is adapted."""
    return {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, ExpertsLora)
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    }


# ---- adapters of runs, put on by others


@pytest.fixture(scope="module")
def written(nf4_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Tensor, Tensor]]:
    """The adapter of a run over an NF4 folder: where it is, token ids, and the logits that are true for them."""
    made: dict[str, tuple[Path, Tensor, Tensor]] = {}

    def write(family: str, *targets: str, **settings: Any) -> tuple[Path, Tensor, Tensor]:
        key = f"{family}-{'-'.join(targets)}-{settings}"
        if key not in made:
            live = adapt(load_tiny(nf4_of(family)), targets=list(targets), **settings)
            train_a_little(live)
            out = tmp_path_factory.mktemp("adapter")
            live.save_pretrained(str(out))
            config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = str(nf4_of(family))
            (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            ids = random_rows(3, 16)
            made[key] = out, ids, logits_of(live, ids)
        return made[key]

    return write


def with_load_adapter(nf4: Path, adapter: Path) -> nn.Module:
    model = by_transformers(nf4)
    report = model.load_adapter(str(adapter))
    assert report.missing_keys | report.unexpected_keys == set()
    return model


def as_second(nf4: Path, adapter: Path) -> nn.Module:
    model = get_peft_model(by_transformers(nf4), lora(r=2))
    model.load_adapter(str(adapter), "second")
    model.set_adapter("second")
    return model


def into_one_with_other_scales(nf4: Path, adapter: Path) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
    model = get_peft_model(by_transformers(nf4), lora(lora_alpha=64, target_modules=targets))
    model.load_adapter(str(adapter), "default")
    return model


CALLS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "PeftModel.from_pretrained": lambda nf4, adapter: PeftModel.from_pretrained(by_transformers(nf4), adapter),
    "from_pretrained, low_cpu_mem_usage": lambda nf4, adapter: PeftModel.from_pretrained(
        by_transformers(nf4), adapter, low_cpu_mem_usage=True
    ),
    "from_pretrained, is_trainable": lambda nf4, adapter: PeftModel.from_pretrained(
        by_transformers(nf4), adapter, is_trainable=True
    ),
    "AutoPeftModelForCausalLM": lambda nf4, adapter: AutoPeftModelForCausalLM.from_pretrained(
        adapter, dtype=torch.float32
    ),
    "AutoModelForCausalLM": lambda nf4, adapter: AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
    "PreTrainedModel.load_adapter": with_load_adapter,
    "PeftModel.load_adapter": as_second,
    "PeftModel.load_adapter, an adapter that is there": into_one_with_other_scales,
    "a model of load_model": lambda nf4, adapter: PeftModel.from_pretrained(load_tiny(nf4).model, adapter),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_on_an_nf4_folder_gives_the_adapters_true_logits(call: str, nf4: Path, written: Any) -> None:
    adapter, ids, truth = written("mixtral", "attention", "experts")
    assert torch.equal(logits_of(CALLS[call](nf4, adapter), ids), truth)


@pytest.mark.parametrize("targets", [["experts"], ["w1"], ["w2", "router"], ["lm_head", "w3"]], ids="-".join)
def test_from_pretrained_adapts_what_the_adapter_holds_and_nothing_else(
    targets: list[str], nf4: Path, written: Any
) -> None:
    adapter, ids, truth = written("mixtral", *targets)
    loaded = PeftModel.from_pretrained(by_transformers(nf4), adapter)
    assert torch.equal(logits_of(loaded, ids), truth)
    assert linears_of(loaded) == {"router": {"gate"}, "lm_head": {"lm_head"}}.get(targets[0], set()) | (
        {"gate"} if "router" in targets else set()
    )


def test_experts_without_the_shared_ones_of_the_same_names_stay_without(nf4_of: FolderOf, written: Any) -> None:
    adapter, ids, truth = written("qwen2_moe", "experts")
    loaded = PeftModel.from_pretrained(by_transformers(nf4_of("qwen2_moe")), adapter)
    assert torch.equal(logits_of(loaded, ids), truth)
    assert linears_of(loaded) == set()


@pytest.mark.parametrize("settings", [{"rslora": True}, {"rank_pattern": {"w1": 2}, "alpha_pattern": {"w2": 5.0}}])
def test_from_pretrained_takes_scales_and_ranks_from_the_files(
    settings: dict[str, Any], nf4: Path, written: Any
) -> None:
    adapter, ids, truth = written("mixtral", "experts", "q_proj", **settings)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(by_transformers(nf4), adapter), ids), truth, rtol=1e-4, atol=1e-5
    )


def test_all_linear_means_linears_that_compute_as_one(tmp_path: Path) -> None:
    folder = quantized(save_random(tmp_path / "source", build.tiny_config("deepseek_v4")), tmp_path / "nf4")
    base = by_transformers(folder)
    found = get_peft_model(base, lora(target_modules="all-linear"))
    assert logits_of(found, torch.arange(3, 14)[None]).isfinite().all()
    assert len(experts_of(found)) == sum(isinstance(module, Nf4Experts) for module in base.modules())


def test_all_linear_leaves_out_a_linear_whose_weight_the_16_bit_model_uses_without_calling_it(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", build.tiny_config("jamba"))
    folder = quantized(source, tmp_path / "nf4")
    found = get_peft_model(by_transformers(folder), lora(target_modules="all-linear"))
    assert "in_proj" in linears_of(found)
    assert "dt_proj" not in linears_of(found)
    train_a_little(found)
    found.save_pretrained(tmp_path / "adapter")
    ids = random_rows(2, 12)
    stock = stock_peft(dequantized(load_tiny(folder), source), tmp_path / "adapter")
    assert torch.allclose(logits_of(stock, ids), logits_of(found, ids), atol=1e-4)


def test_get_peft_model_on_a_peft_model_is_refused_by_name(model: PreTrainedModel) -> None:
    found = get_peft_model(model, lora())
    with (
        pytest.warns(UserWarning, match=r"second time|Already found"),
        pytest.raises(ConfigError, match="is a PeftModel already"),
    ):
        get_peft_model(found, lora(target_modules=["w2"]))


def test_an_adapter_saved_without_a_task_type_loads_by_its_auto_mapping(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    found = get_peft_model(model, lora(task_type=None))
    train_a_little(found)
    found.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(nf4)}
    assert config["auto_mapping"]["base_model_class"] == "MixtralForCausalLM"
    path.write_text(json.dumps(config), encoding="utf-8")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(logits_of(again, ids), logits_of(found, ids), atol=1e-5)


def test_get_peft_model_with_experts_named_as_modules_and_as_stacks_does_not_warn(nf4_of: FolderOf) -> None:
    """As the files of families do that stock PEFT reads by both names."""
    config = lora(target_modules=["q_proj", "down_proj"], target_parameters=["experts.down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="target_parameters: nothing in this model")
        found = get_peft_model(by_transformers(nf4_of("qwen2_moe")), config)
    assert all(set(ranks) == {"down"} for ranks in experts_of(found).values())


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h", "granitemoe"])
def test_families_that_lay_experts_out_otherwise_keep_them(kind: str, tmp_path: Path) -> None:
    folder = quantized(save_random(tmp_path / "source", build.tiny_config(kind)), tmp_path / "nf4")
    live = adapt(load_tiny(folder), targets=["experts"])
    train_a_little(live)
    live.save_pretrained(str(tmp_path / "adapter"))
    ids = random_rows(2, 12)
    base = auto_class(live.config).from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter"), ids), logits_of(live, ids), atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any")  # PEFT of its own pattern
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any")
def test_an_adapter_that_stock_peft_made_over_16_bits_loads_on_the_nf4_folder(
    loaded: LoadedModel, mixtral: Path, model: PreTrainedModel, tmp_path: Path, ids: Tensor
) -> None:
    stock = get_peft_model(dequantized(loaded, mixtral), lora(target_modules=["w1", "w2", "w3", "gate", "o_proj"]))
    train_a_little(stock)
    stock.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(model, tmp_path)
    assert torch.allclose(logits_of(found, ids), logits_of(stock, ids), rtol=1e-4, atol=1e-4)
    assert set(experts_of(found)) == {f"base_model.model.model.layers.{layer}.mlp.experts" for layer in (0, 1)}


def test_an_adapter_of_other_layers_is_refused(model: PreTrainedModel, written: Any) -> None:
    adapter, _, _ = written("mixtral", "experts")
    found = get_peft_model(model, lora(target_modules=["w1"]))
    train_a_little(found)
    with pytest.raises(CheckpointError, match="has been trained with others"):
        found.load_adapter(str(adapter), "default")


# ---- new adapters by a stock LoraConfig


@pytest.mark.parametrize(
    ("settings", "projections", "linears"),
    [
        ({"target_modules": ["w1", "w2", "w3"]}, ALL, set()),
        ({"target_modules": ["gate_proj", "down_proj"]}, ("gate", "down"), set()),
        ({"target_modules": ["gate_up_proj", "q_proj"]}, ("gate", "up"), {"q_proj"}),
        ({"target_modules": ["mlp.experts"]}, ALL, set()),
        ({"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, ("gate", "up"), set()),
        ({"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}, ("down",), {"o_proj"}),
        ({"target_modules": "all-linear"}, ALL, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["w2", "o_proj"]}, ALL[:2], QKV),
        ({"target_modules": r".*\.experts\.\d+\.w3"}, ("up",), set()),
        ({"target_modules": r".*\.(v_proj|w1)"}, ("gate",), {"v_proj"}),
        ({"target_modules": ["w1", "gate"], "lora_dropout": 0.1}, ("gate",), {"gate"}),
        ({"target_modules": ["w1", "embed_tokens"]}, ("gate",), {"embed_tokens"}),
    ],
    ids=str,
)  # fmt: skip
def test_get_peft_model_adapts_the_experts_that_a_lora_config_names(
    settings: dict[str, Any], projections: tuple[str, ...], linears: set[str], model: PreTrainedModel
) -> None:
    found = get_peft_model(model, lora(**settings))
    ranks = experts_of(found)
    assert len(ranks) == 2
    assert all(each == dict.fromkeys(projections, (4, 8)) for each in ranks.values())
    assert linears_of(found) == linears


def test_patterns_and_layers_of_a_lora_config_hold_for_experts(model: PreTrainedModel) -> None:
    config = lora(rank_pattern={"w1": 2}, alpha_pattern={"w2": 5}, layers_to_transform=[1])
    assert experts_of(get_peft_model(model, config)) == {
        "base_model.model.model.layers.1.mlp.experts": {"gate": (2, 8), "up": (4, 8), "down": (4, 5)}
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora=True cannot be had on 4-bit experts"),
        ({"lora_bias": True}, "lora_bias=True cannot be had"),
        ({"bias": "all"}, "bias='all' cannot be had"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot be had"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' cannot be had"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' cannot be had"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' cannot be had"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"modules_to_save": ["experts"]}, "'experts' names 4-bit experts"),
        ({"modules_to_save": ["w1"], "target_modules": ["q_proj"]}, "'w1' names 4-bit experts"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "'mlp' names 4-bit experts or a block"),
        ({"target_modules": r".*experts\.0\.w1"}, "takes 1 of the 4 experts"),
        ({"rank_pattern": {r"experts\.0\.w1": 2}}, "the experts of .* share a rank"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_what_experts_cannot_have_is_refused_by_name(
    settings: dict[str, Any], told: str, model: PreTrainedModel
) -> None:
    with pytest.raises(ConfigError, match=told):
        get_peft_model(model, lora(**settings))
    assert not any(isinstance(layer, LoraLayer) for layer in model.modules())


def test_attention_alone_may_have_what_experts_cannot(model: PreTrainedModel) -> None:
    found = get_peft_model(model, lora(target_modules=["q_proj"], use_dora=True))
    assert linears_of(found) == {"q_proj"}


def test_a_name_that_fits_nothing_is_told(model: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match=r"nothing in this model is called 'wi_0'.* are called w1, w3, w2"):
        get_peft_model(model, lora(target_modules=["q_proj", "wi_0"]))


def test_other_methods_are_refused_on_experts(model: PreTrainedModel) -> None:
    settings = {"task_type": TaskType.CAUSAL_LM, "feedforward_modules": []}
    with pytest.raises(ConfigError, match=r"IA3 .* cannot adapt 4-bit experts"):
        get_peft_model(model, IA3Config(target_modules=["k_proj", "w2"], **settings))
    with pytest.warns(UserWarning, match="all-linear does not mean the 4-bit experts with IA3"):
        get_peft_model(model, IA3Config(target_modules="all-linear", **settings))


def step(model: nn.Module, ids: Tensor) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_prepared_for_kbit_training_every_factor_moves_and_no_frozen_byte(
    reentrant: bool, model: PreTrainedModel, ids: Tensor
) -> None:
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    before = frozen_bytes(prepared)
    found = get_peft_model(prepared, lora(target_modules="all-linear")).train()
    train_a_little(found)
    factors = {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}
    assert step(found, ids) > step(found, ids)
    after = dict(found.named_parameters())
    assert [name for name, old in factors.items() if torch.equal(after[name], old)] == []
    names = {name.replace(".base_layer", ""): tensor for name, tensor in frozen_bytes(prepared).items()}
    assert changed(before, {name: names[name] for name in before}) == []


SAVED = {
    "plain": lora(),
    "down alone": lora(target_modules=["w2", "v_proj"], alpha_pattern={"w2": 3}),
    "scales and ranks": lora(use_rslora=True, lora_dropout=0.1),
    "with a head of its own": lora(target_modules="all-linear", modules_to_save=["lm_head"]),
    "with the router": lora(target_modules=["gate", "down_proj"]),
    "with embeddings": lora(
        lora_alpha=7, target_modules=["embed_tokens", "down_proj"], rank_pattern={"embed_tokens": 6}
    ),
}


@pytest.mark.parametrize("what", SAVED)
def test_a_saved_adapter_is_what_stock_peft_and_an_nf4_folder_read(
    what: str, model: PreTrainedModel, loaded: LoadedModel, mixtral: Path, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    found = get_peft_model(model, copy.deepcopy(SAVED[what]))
    train_a_little(found)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "modules_to_save.default" in name:
                parameter.mul_(1.5)
    found.save_pretrained(tmp_path)
    truth = logits_of(found, ids)
    again = logits_of(PeftModel.from_pretrained(by_transformers(nf4), tmp_path), ids)
    assert torch.allclose(again, truth, rtol=1e-5, atol=1e-5)
    # The same 4-bit weights, as 16-bit models have them, under PEFT alone.
    assert torch.allclose(logits_of(stock_peft(dequantized(loaded, mixtral), tmp_path), ids), truth, atol=1e-4)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".experts." in name for name in names)


def test_an_embeddings_factors_are_read_at_the_files_scale_into_an_adapter_of_another(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    targets = ["embed_tokens", "w2"]
    found = get_peft_model(model, lora(lora_alpha=12, target_modules=targets))
    train_a_little(found)
    found.save_pretrained(tmp_path)
    other = get_peft_model(by_transformers(nf4), lora(lora_alpha=64, target_modules=targets))
    other.load_adapter(str(tmp_path), "default")
    assert torch.allclose(logits_of(other, ids), logits_of(found, ids), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 12}, {"r": 2}], ids=str)
def test_a_stack_and_an_embedding_saved_together_load_in_stock_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """Where the file's r is that of gate and up together, an embedding's factors are filled up to it too."""
    source = save_random(tmp_path / "source", build.tiny_config("gpt_oss"))
    folder = quantized(source, tmp_path / "nf4")
    targets = ["embed_tokens", "gate_up_proj"]
    found = get_peft_model(by_transformers(folder), lora(target_modules=targets, **settings))
    train_a_little(found)
    found.save_pretrained(tmp_path / "adapter")
    ids = random_rows(2, 12)
    base = dequantized(load_tiny(folder), source)
    for again in (
        PeftModel.from_pretrained(by_transformers(folder), tmp_path / "adapter"),
        stock_peft(base, tmp_path / "adapter"),
    ):
        assert torch.allclose(logits_of(again, ids), logits_of(found, ids), atol=1e-4)


def test_transformers_own_add_adapter_trains_and_saves_the_experts(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    model.add_adapter(lora())
    train_a_little(model)
    model.save_pretrained(tmp_path)
    again = by_transformers(nf4)
    again.load_adapter(str(tmp_path))
    assert len(experts_of(again)) == 2
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_inject_adapter_in_model_by_the_names_of_a_state_dict(model: PreTrainedModel, written: Any) -> None:
    adapter, _, _ = written("mixtral", "w1", "q_proj")
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = inject_adapter_in_model(lora(target_modules=["k_proj"]), model, state_dict=tensors)
    assert linears_of(found) == {"q_proj"}
    assert all(set(ranks) == {"gate"} for ranks in experts_of(found).values())


# ---- the life of such an adapter


@pytest.fixture
def two(model: PreTrainedModel) -> PeftModel:
    found = get_peft_model(model, lora())
    found.add_adapter("second", lora(r=2, target_modules=["experts", "v_proj"]))
    train_a_little(found)
    return found.eval()


def test_disabled_the_base_answers_and_set_adapter_switches(
    two: PeftModel, pristine: PreTrainedModel, ids: Tensor
) -> None:
    first = logits_of(two, ids)
    with two.disable_adapter():
        assert torch.equal(logits_of(two, ids), logits_of(pristine, ids))
    two.set_adapter("second")
    assert not torch.allclose(logits_of(two, ids), first, atol=1e-2)
    names = [name for name, parameter in two.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".second" in name for name in names)
    two.set_adapter("default")
    assert torch.equal(logits_of(two, ids), first)


@pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted")
def test_delete_adapter_leaves_the_other(two: PeftModel, ids: Tensor) -> None:
    first = logits_of(two, ids)
    two.delete_adapter("second")
    assert not [name for name, _ in two.named_parameters() if "second" in name]
    assert torch.equal(logits_of(two, ids), first)


def test_merging_is_refused_before_anything_is_merged(two: PeftModel) -> None:
    for merge in (two.merge_adapter, two.merge_and_unload):
        with pytest.raises(ExportError, match="cannot absorb an adapter in place"):
            merge()
    assert not any(layer.merged for layer in two.modules() if isinstance(layer, LoraLayer))


def test_unload_gives_the_base_back(two: PeftModel, pristine: PreTrainedModel, ids: Tensor) -> None:
    assert torch.equal(logits_of(two.unload(), ids), logits_of(pristine, ids))


def test_number_of_parameters_counts_weights_of_experts_and_not_their_bytes(
    two: PeftModel, loaded: LoadedModel, mixtral: Path
) -> None:
    trainable, everything = two.get_nb_trainable_parameters()
    adapters = sum(parameter.numel() for name, parameter in two.named_parameters() if "lora_" in name)
    assert trainable == sum(parameter.numel() for parameter in two.parameters() if parameter.requires_grad)
    assert everything - adapters == sum(parameter.numel() for parameter in dequantized(loaded, mixtral).parameters())


def test_adapter_names_give_each_sequence_its_own_adapter(two: PeftModel, ids: Tensor) -> None:
    expected = []
    for adapter in ("default", "second"):
        two.set_adapter(adapter)
        expected.append(logits_of(two, ids))
    with two.disable_adapter():
        expected.append(logits_of(two, ids))
    with torch.no_grad():
        mixed = two(ids, adapter_names=["second", "__base__", "default"]).logits
    for row, which in enumerate((1, 2, 0)):
        assert torch.allclose(mixed[row], expected[which][row], atol=1e-5)


def test_add_weighted_adapter_and_hotswap_are_refused_by_name(two: PeftModel, written: Any) -> None:
    adapter, _, _ = written("mixtral", "experts")
    with pytest.raises(ExportError, match="add_weighted_adapter does not mix"):
        two.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third")
    assert set(two.peft_config) == {"default", "second"}
    with pytest.raises(ConfigError, match="hotswap: "):
        hotswap_adapter(two, str(adapter), "default")
    with pytest.raises(ConfigError, match="hotswap: "):
        two.get_base_model().load_adapter(str(adapter), "default", hotswap=True)


def test_a_live_config_makes_a_second_adapter_of_the_same_layers(two: PeftModel, ids: Tensor) -> None:
    """As TRL's trainers add a frozen copy to compare with."""
    two.add_adapter("ref", two.peft_config["default"])
    assert experts_of(two, "ref") == experts_of(two, "default")
    assert linears_of(two, "ref") == linears_of(two, "default")
