"""A tiny Mixtral with 4-bit experts, and adapters on it."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.adapt.attach import attach
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection
from tests.tiny_models import FolderOf, copied, dequantized, load_tiny, random_rows

Load = Callable[..., LoadedModel]
Stock = Callable[..., PreTrainedModel]
EVERYTHING = ["attention", "experts", "lm_head"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
W1 = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_A.weight"


@pytest.fixture
def mixtral(family_folder: FolderOf) -> Path:
    return family_folder("mixtral")


@pytest.fixture(scope="session")
def load(family_folder: FolderOf) -> Load:
    """A family's model in 4 bits, of the test's own: attaching changes it. Each is loaded once, and copied."""
    held: dict[str, LoadedModel] = {}

    def load_family(family: str = "mixtral") -> LoadedModel:
        if family not in held:
            held[family] = load_tiny(family_folder(family))
        return copied(held[family])

    return load_family


@pytest.fixture(scope="session")
def stock(load: Load, family_folder: FolderOf) -> Stock:
    """A family's stock model over the weights that the 4-bit one decodes to, of the test's own; each is made once."""
    held: dict[str, PreTrainedModel] = {}

    def stock_family(family: str = "mixtral") -> PreTrainedModel:
        if family not in held:
            held[family] = dequantized(load(family), family_folder(family))
        return copy.deepcopy(held[family])

    return stock_family


@pytest.fixture
def loaded(load: Load) -> LoadedModel:
    return load("mixtral")


def adapt(loaded: LoadedModel, adapter_name: str = "default", onto: ExpertPeftModel | None = None, **lora: Any):
    """Attach an adapter; targets are attention, experts and the output head unless the test says otherwise."""
    section = LoraSection(**({"r": 4, "alpha": 8, "targets": EVERYTHING} | lora))
    return attach(loaded, section, base_model="owner/tiny", adapter_name=adapter_name, onto=onto)


def adopt(loaded: LoadedModel, folder: Path, **lora: Any) -> ExpertPeftModel:
    """Attach an adapter that starts from a folder; the run file sets nothing but what the test says."""
    return attach(loaded, LoraSection(init_from=str(folder), **lora), base_model="owner/tiny")


def train_a_little(model: nn.Module, seed: int = 1) -> None:
    """Give every factor the size that training gives it: B starts at zero, where nothing could go wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def stock_peft(base: nn.Module, folder: Path) -> PeftModel:
    """The adapter as plain PEFT reads it, over plain transformers."""
    with warnings.catch_warnings():
        # PEFT asks transformers by a renamed property, and takes pattern keys of wrapped parameters for unused ones.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any")
        return PeftModel.from_pretrained(base, folder)


@pytest.fixture
def ids() -> Tensor:
    return random_rows(3, 16)


@pytest.fixture(scope="session")
def saved_once(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = adapt(load()), tmp_path_factory.mktemp("saved")
    train_a_little(model)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """The files of an adapter, of the test's own."""
    return shutil.copytree(saved_once, tmp_path / "adapter")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
