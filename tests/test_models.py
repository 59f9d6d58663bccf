"""Models for a program of one's own: loaded, given adapters and asked, by the public names alone."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import expertune
from expertune.adapt.files import read_adapter_base
from expertune.checkpoint.load import fingerprint_of
from expertune.config import LoraSection
from expertune.errors import CheckpointError, ConfigError
from expertune.models import LoraOptions
from tests.tiny_models import random_rows, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "mixtral")


def with_values(model: PeftModel) -> PeftModel:
    """B of every adapter away from zero, so that it changes the logits."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_adapter_of_a_loaded_model_is_saved_and_put_on_another(folder: Path, tmp_path: Path) -> None:
    ids = random_rows()
    model = expertune.attach(expertune.load_model(folder, "float32", "cpu"), r=4, targets=["attention", "experts"])
    with_values(model).eval().save_pretrained(str(tmp_path))
    again = expertune.load_adapter(expertune.load_model(folder, "float32", "cpu"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        with again.disable_adapter():
            base = again(ids).logits
        assert not torch.equal(again(ids).logits, base)
        # A second one beside it, which is not active yet.
        expertune.load_adapter(again, tmp_path, "second")
        again.set_adapter("second")
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert not again.training
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(folder)


def test_nf4_folder_is_the_same_by_transformers_and_by_load_model(folder: Path, tmp_path: Path) -> None:
    written = expertune.quantize(str(folder), tmp_path / "nf4")
    assert repr(written) == f"Nf4Folder(folder={tmp_path / 'nf4'!r})"
    ids = random_rows()
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32),
        expertune.load_model(tmp_path / "nf4", "float32", "cpu"),
    ]
    adapted = [expertune.attach(model, targets="experts", r=2).eval() for model in models]  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in adapted))
    origins = [model.origins["default"] for model in adapted]
    assert origins[0] == origins[1]


def test_adapters_beside_each_other_have_one_base_by_transformers_as_by_load_model(
    folder: Path, tmp_path: Path
) -> None:
    expertune.quantize(folder, tmp_path / "nf4")

    def by_transformers() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)

    model = expertune.attach(by_transformers(), r=2, targets=["attention", "experts"])
    with_values(model).eval().save_pretrained(str(tmp_path / "alone"))
    expertune.load_adapter(model, tmp_path / "alone", "second")
    expertune.attach(model, "third", r=2, targets=["attention"])
    model.save_pretrained(str(tmp_path / "beside"))
    alone, *beside = (
        read_adapter_base(tmp_path / name) for name in ("alone", "beside", "beside/second", "beside/third")
    )
    assert alone is not None
    assert alone.weights.keys() >= {"linears", "experts"}
    assert beside == [alone] * 3
    for same in (by_transformers(), expertune.load_model(tmp_path / "nf4", "float32", "cpu")):
        expertune.load_adapter(same, tmp_path / "beside" / "second")


def test_adapter_that_transformers_has_put_on_and_taken_off_leaves_the_base_what_it_was(
    folder: Path, tmp_path: Path
) -> None:
    expertune.quantize(folder, tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "other")
    model.delete_adapter("other")
    expertune.attach(model, r=2, targets=["attention"]).save_pretrained(str(tmp_path / "adapter"))
    assert read_adapter_base(tmp_path / "adapter") == fingerprint_of(tmp_path / "nf4")


def test_a_model_is_held_as_an_adapter_of_its_run_has_it(folder: Path, tmp_path: Path) -> None:
    layers = {"attention": 16}
    model = expertune.attach(expertune.load_model(folder, "float32", "cpu", layers=layers), r=2, targets="experts")
    with_values(model).eval().save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"as an argument of expertune\.load_model"):
        expertune.load_adapter(expertune.load_model(folder, "float32", "cpu"), tmp_path / "adapter")
    expertune.quantize(folder, tmp_path / "nf4", layers=layers)
    ids = random_rows()
    for same in (
        expertune.load_model(folder, "float32", "cpu", layers={"[qkvo]_proj": 16}),
        AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32),
    ):
        with torch.no_grad():
            assert torch.equal(expertune.load_adapter(same, tmp_path / "adapter")(ids).logits, model(ids).logits)


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    model = expertune.load_model(folder, "float32", "cpu")
    with pytest.raises(ConfigError, match="attach: no argument is called rank; did you mean r"):
        expertune.attach(model, rank=8)  # type: ignore[call-arg]
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        expertune.load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match=r"revision: main is of a hub id, and .* is a folder"):
        expertune.load_model(folder, revision="main")
    with pytest.raises(ConfigError, match=r"revision: main is of a hub id, and .* is a folder"):
        expertune.quantize(folder, tmp_path / "nf4", revision="main")
    with pytest.raises(ConfigError, match=r"take a model from expertune\.load_model"):
        expertune.attach(AutoModelForCausalLM.from_pretrained(folder))


def test_what_is_no_adapter_is_told_with_the_folder_that_is_one(folder: Path, tmp_path: Path) -> None:
    model = expertune.load_model(folder, "float32", "cpu")
    adapter = tmp_path / "run" / "adapter"
    with pytest.raises(ConfigError, match=rf"^folder: {adapter}: no such folder; give the folder of an adapter"):
        expertune.load_adapter(model, adapter)
    with pytest.raises(ConfigError, match=rf"^init_from: {adapter}: no such folder; give the folder of an adapter"):
        expertune.attach(model, init_from=str(adapter))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match=rf": a run directory without an adapter yet; give {checkpoint}$"):
        expertune.load_adapter(model, tmp_path / "run")
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match=rf"^folder: {tmp_path / 'run'}: a run directory; its adapter is {adapter}$"):
        expertune.load_adapter(model, tmp_path / "run")


def test_second_adapter_needs_a_name_of_its_own_and_the_model_of_the_first(folder: Path) -> None:
    base = expertune.load_model(folder, "float32", "cpu")
    model = expertune.attach(base, r=2)
    with pytest.raises(ConfigError, match="model: it has an adapter already; give what attach or"):
        expertune.attach(base, r=2)
    with pytest.raises(ConfigError, match="adapter_name: the model has an adapter called 'default' already"):
        expertune.attach(model, r=2)
    for name in ("", "a.b", "lora"):
        with pytest.raises(ConfigError, match=f"adapter_name: '{name}' is no name for an adapter"):
            expertune.attach(model, name, r=2)
    assert sorted(expertune.attach(model, "second", r=2).peft_config) == ["default", "second"]


@pytest.mark.parametrize("dtype", ["fp32", "float", torch.float32])
def test_dtype_may_be_said_as_torch_says_it_or_in_short(folder: Path, dtype: str | torch.dtype) -> None:
    assert expertune.load_model(folder, dtype, "cpu").dtype == torch.float32


def test_options_of_attach_are_the_keys_of_the_run_files_section() -> None:
    assert LoraOptions.__annotations__.keys() == LoraSection.model_fields.keys()
