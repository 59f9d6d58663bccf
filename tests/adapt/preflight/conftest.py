"""What the tests of the preflight check have in common."""

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.adapt.comparison import BaseForward, probe_logits
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.preflight import preflight
from expertune.checkpoint.load import LoadedModel
from expertune.errors import PreflightError
from tests.adapt.conftest import EVERYTHING, adapt
from tests.tiny_models import VOCABULARY, random_rows

EXPERTS = "model.layers.1.mlp.experts"
Batch = dict[str, Tensor]


def batch_of(num_rows: int = 4, length: int = 24) -> Batch:
    ids = random_rows(num_rows, length)
    return {"input_ids": ids, "labels": ids.clone()}


def concatenated_batch() -> Batch:
    positions = torch.cat([torch.arange(length) for length in (17, 1, 40)])[None]
    ids = torch.randint(3, VOCABULARY, positions.shape)
    return {"input_ids": ids, "position_ids": positions, "labels": torch.full_like(ids, -100)}


def padded_batch() -> Batch:
    batch = batch_of()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :10] = mask[1, :3] = 0
    return batch | {"attention_mask": mask}


@pytest.fixture(params=["one after the other", "in turns"], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the forwards pass the layers: in turns as where experts are offloaded, or each alone."""
    if request.param == "in turns":
        placement = types.SimpleNamespace(is_prefetched=True, in_turns=nullcontext)
        monkeypatch.setattr("expertune.adapt.comparison.placement_of", lambda model: placement)
    return request.param


def check(model: ExpertPeftModel, batch: Batch, base: Tensor) -> dict[str, Any]:
    return preflight(model, batch, BaseForward(batch, base))


def prepared(loaded: LoadedModel, batch: Batch, **lora: Any) -> tuple[ExpertPeftModel, Tensor]:
    base = probe_logits(loaded.model, batch)
    return adapt(loaded, **({"targets": [*EVERYTHING, "router"]} | lora)), base


def expect_failure(model: ExpertPeftModel, batch: Batch, base: Tensor, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        check(model, batch, base)
