"""Two adapters on one NF4 folder: switched, disabled, deleted, told apart within a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import PreTrainedModel

from expertune.checkpoint.load import LoadedModel
from expertune.errors import ConfigError, ExportError
from tests.adapt.conftest import logits_of, train_a_little
from tests.adapt.stock.conftest import experts_of, linears_of, lora
from tests.tiny_models import dequantized

# PEFT asks transformers by a renamed property, and tells that a head among the targets is copied into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


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
