"""Every MoE family of the installed transformers: loaded in 4 bits, computed, trained, saved, by contract alone."""

import copy
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForMultimodalLM, PreTrainedModel

import expertune
from expertune.adapt.attach import attach
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.headers import check_headers, read_headers
from expertune.checkpoint.meta import auto_class, build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.quantize import quantize
from expertune.config import LoraSection
from expertune.data import LeftPaddingCollator, PaddingFreeCollator
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.contract import find_experts
from expertune.experts.lora import ExpertsLora
from expertune.experts.module import experts_passed_by
from expertune.layers.varlen_attention import NAME, require_no_leakage, use_sdpa_attention
from tests.experts.families import experts_classes, from_matrices
from tests.families.build import FIRST_SPECIAL, families, model_type, tiny_config
from tests.tiny_models import (
    changed,
    copied,
    dequantized,
    frozen_bytes,
    load_tiny,
    save_random,
    stacked_weights,
    stock_model,
)

EXCEPTIONS = {
    "DiffusionGemmaTextExperts": "fills blocks of noise; has no model that predicts the next token",
    "OpenAIPrivacyFilterExperts": "labels tokens; has no model that predicts the next one",
    "Qwen3OmniMoeTalkerTextExperts": "speaks: predicts codes of sound from another model's states",
}
"""Experts that stand in no language model, by class."""


PADDING_COUNTS = {
    "DeepseekV4Experts": "compresses keys and values in windows that are counted from the batch's first column",
}
"""Experts of models in which what a row computes depends on the padding before it, by class."""


_LOST = r"PEFT loses the tensors of model\.layers\.1\.self_attn\.v_(proj\.)?sconv\.weight_proj"
UNREADABLE = {"Inkling2Experts": _LOST, "Inkling2LoopExperts": _LOST}
"""Experts of models in which stock PEFT loses a linear beside them, by class."""


Factor = tuple[str, str, str]
"""Experts module, projection, A or B."""


@dataclass
class Family:
    """A tiny model of a family: as transformers wrote it, in 4 bits with adapters, and stock over what that decodes.

    Attributes:
        experts: class of its experts.
        folder: what `save_pretrained` of transformers wrote, bfloat16.
        model: all experts adapted, their B no longer zero; products in float32.
        stock: transformers' own, its weights those that the 4-bit model decodes, its experts one at a time.
        loaded_bytes: every frozen tensor as it was loaded from the folder.
        by_default: a second model: all that is a target by default is adapted, its B zero at first.
    """

    experts: str
    folder: Path
    model: ExpertPeftModel
    stock: PreTrainedModel
    loaded_bytes: dict[str, Tensor]
    by_default: ExpertPeftModel


@pytest.fixture(scope="module", params=[name for name in experts_classes() if name not in EXCEPTIONS])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    kind = model_type(experts_classes()[request.param].parent.name)
    assert kind is not None
    folder = save_random(tmp_path_factory.mktemp(kind), tiny_config(kind))
    loaded = load_tiny(folder)
    assert loaded.unexpected == []
    stock, loaded_bytes = dequantized(loaded, folder), frozen_bytes(loaded.model)
    assert request.param in {type(experts).__name__ for _, experts in find_experts(stock)}
    by_default = attach(copied(loaded), LoraSection(r=2, alpha=3, dropout=0.0), str(folder))
    lora = LoraSection(r=2, alpha=3, targets=["experts"], dropout=0.0, dtype="float32")
    model = attach(loaded, lora, str(folder))
    with torch.no_grad():
        for factor in trained(model).values():
            factor.normal_(std=0.1)
    return Family(request.param, folder, model, stock, loaded_bytes, by_default)


def trained(model: nn.Module) -> dict[Factor, nn.Parameter]:
    """Every factor of the experts' adapters by module, projection and A or B."""
    return {
        (live_name(name), projection, factor): parameter
        for name, module in model.named_modules()
        if isinstance(module, ExpertsLora)
        for factor in ("lora_A", "lora_B")
        for projection, parameter in getattr(module, factor)["default"].items()
    }


def live_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def tokens() -> Tensor:
    return torch.randint(3, FIRST_SPECIAL, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@torch.no_grad()
def test_loaded_family_gives_stock_transformers_logits_over_the_decoded_weights(family: Family) -> None:
    expected = logits(family.stock)
    scale = float(expected.abs().max())
    assert scale > 0.01
    with family.model.disable_adapter():
        torch.testing.assert_close(logits(family.model), expected, rtol=1e-5, atol=1e-5 * max(1, scale))


def test_adapters_learn_what_autograd_says_over_dense_weights(family: Family) -> None:
    ours = trained(family.model)
    mine = logits(family.model)
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    leaves = {key: factor.detach().clone().requires_grad_() for key, factor in ours.items()}
    dense = with_updates(family, leaves)
    theirs = functional_call(family.stock, dense, kwargs={"input_ids": tokens(), "use_cache": False}).logits
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * max(1, scale))

    expected = gradients((theirs * weight).sum(), leaves)
    found = gradients((mine * weight).sum(), ours)
    # Experts for pictures see no token of a text.
    assert expected
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_default_targets_are_what_a_text_can_train(family: Family) -> None:
    logits(family.by_default).square().sum().backward()
    factors = {name: each for name, each in family.by_default.named_parameters() if each.requires_grad}
    assert any(".experts." in name for name in factors)
    assert any(".experts." not in name for name in factors)
    assert [name for name, each in factors.items() if each.grad is None] == []
    # A starts with no gradient, for B is zero.
    assert [name for name, each in factors.items() if "lora_B" in name and not each.grad.any()] == []


def gradients(loss: Tensor, factors: Mapping[Factor, Tensor]) -> dict[Factor, Tensor]:
    """Of the factors that the loss depends on."""
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return {key: gradient for key, gradient in zip(factors, found, strict=True) if gradient is not None}


def with_updates(family: Family, factors: Mapping[Factor, Tensor]) -> dict[str, Tensor]:
    """The stock model's stacks of experts with scaling * B @ A added, in the family's own layout."""
    dense = {}
    for name, module in family.model.named_modules():
        if not isinstance(module, ExpertsLora):
            continue
        spec = module.base_layer.spec
        for stack, decoded in stacked_weights(module.base_layer, torch.float32).items():
            projections = layout.fused_projections(spec, stack)
            updates = [
                1.5 * factors[live_name(name), projection, "lora_B"] @ factors[live_name(name), projection, "lora_A"]
                for projection in projections
            ]
            dense[f"{live_name(name)}.{stack}"] = torch.stack(
                [
                    whole + from_matrices(spec, stack, [update[expert] for update in updates])
                    for expert, whole in enumerate(decoded)
                ]
            )
    return dense


@torch.no_grad()
def test_saved_adapter_on_a_fresh_load_gives_the_same_logits_bit_for_bit(family: Family, tmp_path: Path) -> None:
    before = logits(family.model)
    family.model.save_pretrained(str(tmp_path))
    loaded = load_tiny(family.folder)
    again = attach(loaded, LoraSection(init_from=str(tmp_path)), str(family.folder))
    # In the files B has a scale of 1.5 in it, which costs a rounding.
    torch.testing.assert_close(logits(again), before, rtol=0, atol=1e-5 * max(1, float(before.abs().max())))
    family.model.save_live_factors(tmp_path)
    again.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(again), before)
    with again.disable_adapter():
        assert not torch.equal(logits(again), before)


@torch.no_grad()
def test_stock_peft_gives_the_logits_of_an_adapter_on_experts_alone(family: Family, tmp_path: Path) -> None:
    expected = logits(family.model)
    assert family.model.stock_layout().refusal is None
    family.model.save_pretrained(str(tmp_path))
    assert_stock_peft_gives(expected, family, tmp_path)


def test_stock_peft_gives_the_logits_of_an_adapter_on_all_that_a_text_can_train_or_is_said_not_to(
    family: Family, tmp_path: Path
) -> None:
    model = family.by_default
    for name, factor in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(factor, std=0.1)
    model.save_pretrained(str(tmp_path))
    refusal = model.stock_layout().refusal
    if family.experts in UNREADABLE:
        assert refusal is not None
        assert re.search(UNREADABLE[family.experts], refusal)
    else:
        assert refusal is None
        assert_stock_peft_gives(logits(model), family, tmp_path)


@torch.no_grad()
def assert_stock_peft_gives(expected: Tensor, family: Family, adapter: Path) -> None:
    """By plain calls of PEFT on the stock model, beside its weights and merged into them."""
    base = logits(family.stock)
    scale = max(1, float(expected.abs().max()))
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"]
    with warnings.catch_warnings():
        # PEFT asks transformers by a renamed property, and takes pattern keys of wrapped parameters for unused ones.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any")
        stock = PeftModel.from_pretrained(copy.deepcopy(family.stock), adapter)
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(logits(stock.merge_and_unload()), expected, rtol=0, atol=2e-5 * scale)


@torch.no_grad()
def test_family_saved_under_live_names_loads_to_the_same_bytes(family: Family, tmp_path: Path) -> None:
    stock = stock_model(family.folder)
    stock.save_pretrained(tmp_path / "live", save_original_format=False)
    with safe_open(tmp_path / "live" / "model.safetensors", framework="pt") as file:
        fused = [key for key in file.keys() if "experts" in key and key.endswith("down_proj")]  # noqa: SIM118
    assert fused
    live = frozen_bytes(load_tiny(tmp_path / "live").model)
    if changed(family.loaded_bytes, live):  # a stock model may have set buffers as it was loaded
        stock.save_pretrained(tmp_path / "original")
        assert changed(frozen_bytes(load_tiny(tmp_path / "original").model), live) == []


def test_family_quantized_to_a_folder_loads_the_same_bytes(family: Family, tmp_path: Path) -> None:
    quantize(str(family.folder), tmp_path / "nf4")
    assert changed(family.loaded_bytes, frozen_bytes(load_tiny(tmp_path / "nf4").model)) == []


def test_plan_finds_a_place_for_every_tensor_and_misses_none(family: Family) -> None:
    model = build_meta_model(family.folder, torch.bfloat16)
    model.tie_weights()
    headers = read_headers(str(family.folder), family.folder, None, on_hub=False)
    assert headers is not None
    names = read_names(model)
    assert check_headers(headers, model, names) == []
    experts = tuple(names.specs)
    rest = {key: shape for key, shape in headers.shapes.items() if not names.locate(key).name.startswith(experts)}
    with pytest.raises(CheckpointError, match="the config asks for tensors that the checkpoint lacks"):
        check_headers(replace(headers, shapes=rest), model, names)


@torch.no_grad()
def test_rows_end_to_end_are_kept_apart_or_refused(family: Family) -> None:
    model = family.model.get_base_model()
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens()]

    def last_row(given: list[dict[str, list[int]]]) -> Tensor:
        batch = PaddingFreeCollator()(given)
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, -tokens().shape[1] :]

    try:
        alone, behind = last_row(rows[1:]), last_row(rows)
        apart = torch.allclose(behind, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    except (UnsupportedModelError, ValueError):
        apart = False  # the family says so by itself
    with experts_passed_by(model):  # as a run tries it
        if apart:
            require_no_leakage(model)
        else:
            with pytest.raises(UnsupportedModelError, match=r"set data\.packing=padded to train this model$"):
                require_no_leakage(model)


@torch.no_grad()
def test_left_padded_rows_have_the_logits_of_each_row_alone_or_are_listed(family: Family) -> None:
    model = family.model.get_base_model()
    rows = [tokens()[0, :5], tokens()[1]]
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    batch = LeftPaddingCollator(max_length=16, pad_token_id=0)(features)
    del batch["labels"]
    usual = model.config._attn_implementation
    use_sdpa_attention(model)
    try:
        padded = model(**batch, use_cache=False).logits
        alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    finally:
        if usual == NAME:
            model.set_attn_implementation(usual)
    atol = 1e-4 * max(1, *(float(each.abs().max()) for each in alone))
    same = all(
        torch.allclose(padded[index, -len(each) :], each, rtol=1e-4, atol=atol) for index, each in enumerate(alone)
    )
    assert same == (family.experts not in PADDING_COUNTS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "tower"), [("qwen3_5_moe", "model.visual."), ("qwen4_exp", "model.visual."), ("gemma4", "")]
)
def test_language_model_is_read_from_the_checkpoint_of_a_larger_one(kind: str, tower: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(tiny_config(kind), dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_tiny(tmp_path)
    assert {key.startswith(tower) for key in loaded.unexpected} == ({True} if tower else set())
    assert all(name.startswith("model.language_model.") for name in map(loaded.names.on_disk, loaded.names.specs))
    expected = logits(dequantized(loaded, tmp_path))
    torch.testing.assert_close(
        logits(loaded.model), expected, rtol=1e-5, atol=1e-5 * max(1, float(expected.abs().max()))
    )


@pytest.mark.parametrize("class_name", EXCEPTIONS)
def test_experts_outside_language_models_are_those_that_are_listed(class_name: str) -> None:
    kind = model_type(experts_classes()[class_name].parent.name)
    if kind is None:
        return
    try:
        config = tiny_config(kind)
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except TypeError:
        return
    assert class_name not in {type(experts).__name__ for _, experts in find_experts(model)}


def test_no_family_is_named_in_the_source() -> None:
    source = Path(expertune.__file__).parent
    named = re.compile(rf"\b({'|'.join(families())})\b", re.IGNORECASE)
    kinds = {".py", ".c", ".h", ".jinja", ".html", ".css", ".yaml", ".json"}
    files = [
        file for file in source.rglob("*.*") if file.suffix in kinds and "assets" not in file.relative_to(source).parts
    ]
    attribute = re.compile(r"\baria-[a-z]+=")  # HTML's
    found = [
        f"{file.relative_to(source)}: {name}"
        for file in files
        for name in named.findall(attribute.sub("", file.read_text(encoding="utf-8")))
    ]
    assert min(len(files), len(families())) > 50
    assert found == []
