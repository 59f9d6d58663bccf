"""An adapter is put on the base model that it was trained on, in 16 bits or as an NF4 folder; on others when asked."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expertune.adapt.attach import attach
from expertune.adapt.files import read_adapter_base
from expertune.checkpoint.load import LoadedModel, fingerprint_of
from expertune.checkpoint.quantize import quantize
from expertune.config import LoraSection, QuantizationConfig
from expertune.errors import CheckpointError
from tests.adapt.conftest import adapt, adopt, train_a_little
from tests.tiny_models import load_tiny, save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "mixtral")


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `base`; tests must not change it."""
    out = tmp_path_factory.mktemp("saved")
    model = adapt(load_tiny(base))
    train_a_little(model)
    model.save_pretrained(str(out))
    return out


@pytest.fixture
def without_fingerprint(saved: Path, tmp_path: Path) -> Path:
    """The same adapter as another tool would have written it."""
    out = tmp_path / "plain"
    out.mkdir()
    (out / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    save_file(load_file(saved / "adapter_model.safetensors"), out / "adapter_model.safetensors")
    return out


def test_adapter_files_carry_the_fingerprint_of_the_base(base: Path, saved: Path, without_fingerprint: Path) -> None:
    assert read_adapter_base(saved) == fingerprint_of(base)
    assert read_adapter_base(without_fingerprint) is None


def test_adapter_files_are_the_same_bytes_every_time(base: Path, tmp_path: Path) -> None:
    """safetensors' own writer puts two entries of metadata into an order that differs from one call to the next."""
    model = adapt(load_tiny(base))
    for number in range(6):
        model.save_pretrained(str(tmp_path / str(number)))
    assert len({(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(6)}) == 1


def test_adapter_goes_onto_the_nf4_folder_of_its_base_and_back(base: Path, saved: Path, tmp_path: Path) -> None:
    quantize(str(base), tmp_path / "nf4")
    model = adopt(load_tiny(tmp_path / "nf4"), saved)
    model.save_pretrained(str(tmp_path / "again"))
    assert read_adapter_base(tmp_path / "again") == read_adapter_base(saved)
    adopt(load_tiny(base), tmp_path / "again")


def test_adapter_of_an_nf4_folder_names_what_the_folder_was_made_of(base: Path, tmp_path: Path) -> None:
    quantize(str(base), tmp_path / "nf4")
    lora = LoraSection(r=2, targets=["attention"])
    attach(load_tiny(tmp_path / "nf4"), lora, str(tmp_path / "nf4")).save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base.resolve()), None)


def test_init_from_an_adapter_of_other_weights_is_refused_unless_asked_for(saved: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "mixtral", seed=1)
    with pytest.raises(
        CheckpointError, match=r"another base model than owner/tiny: other weights \(embeddings"
    ) as told:
        adopt(load_tiny(other), saved)
    assert str(saved) in str(told.value)
    assert "lora.init_from_other_base: true" in str(told.value)
    model = adopt(load_tiny(other), saved, init_from_other_base=True)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert read_adapter_base(tmp_path / "adapter") == fingerprint_of(other)


def test_init_from_an_adapter_of_fewer_layers_is_refused_with_and_without_its_fingerprint(
    saved: Path, without_fingerprint: Path, tmp_path: Path
) -> None:
    deeper = save_tiny_model(tmp_path / "deeper", "mixtral", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="num_hidden_layers was 2 and is 3"):
        adopt(load_tiny(deeper), saved)
    with pytest.raises(
        CheckpointError, match=r"no tensors for 1 of 3 layers of this model, the first is model.layers.2"
    ):
        adopt(load_tiny(deeper), without_fingerprint)
    adopt(load_tiny(deeper), without_fingerprint, init_from_other_base=True)


def test_adapter_without_a_fingerprint_still_loads(base: Path, without_fingerprint: Path) -> None:
    adopt(load_tiny(base), without_fingerprint)


def test_adapter_of_a_base_with_attention_in_16_bits_is_refused_on_one_without(base: Path, tmp_path: Path) -> None:
    mixed = load_tiny(base, layers={"attention": 16})
    adapt(mixed).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        CheckpointError,
        match=r"other 4-bit weights of owner/tiny: quantization\.layers was \{k_proj: 16, .*\} and is \{\}\. "
        r"Hold it as it was, with layers: \{k_proj: 16, .*lora\.init_from_other_base",
    ):
        adopt(load_tiny(base), tmp_path / "adapter")
    quantize(str(base), tmp_path / "nf4", QuantizationConfig(layers={"[kqvo]_proj": 16}))
    for same in (load_tiny(tmp_path / "nf4"), load_tiny(base, layers={"attention": 16})):
        adopt(same, tmp_path / "adapter")
    adopt(load_tiny(base), tmp_path / "adapter", init_from_other_base=True)


def test_adapter_of_an_earlier_release_goes_onto_a_base_with_attention_in_16_bits(base: Path, saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    fingerprint = json.loads(metadata["expertune.base"])
    del fingerprint["layers"], fingerprint["scheme"]
    earlier = saved.parent / "earlier"
    shutil.copytree(saved, earlier)
    notes = metadata | {"expertune.base": json.dumps(fingerprint)}
    save_file(load_file(weights), earlier / "adapter_model.safetensors", notes)
    adopt(load_tiny(base, layers={"attention": 16}), earlier)


def test_adapter_on_some_projections_of_every_layer_is_whole(tmp_path: Path) -> None:
    """Shared experts and dense layers have the names of the experts' projections, and may have no adapter."""
    loaded: LoadedModel = load_tiny(save_tiny_model(tmp_path / "model", "deepseek_v3"))
    adapt(loaded, targets=["experts"]).save_pretrained(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    adopt(load_tiny(tmp_path / "model"), tmp_path / "adapter")
