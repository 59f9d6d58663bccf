"""A tiny Mixtral as an NF4 folder, as transformers loads it, and adapters of runs over it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.experts.lora import ExpertsLora
from tests.adapt.conftest import FolderOf, adapt, logits_of, train_a_little
from tests.checkpoint.nf4_folders import quantized
from tests.tiny_models import load_tiny, random_rows


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
