"""Which file stock PEFT reads is tried before a model is loaded; the model with its adapter needs no second trial."""

from dataclasses import replace

import pytest
import torch

from expertune.adapt import file_layout
from expertune.adapt.attach import expected_layout
from expertune.adapt.layout_trial import Twin
from expertune.checkpoint.meta import build_meta_model
from expertune.config import LoraSection
from tests.adapt.conftest import EVERYTHING, FolderOf, adapt
from tests.tiny_models import load_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_layout_is_tried_once_and_equals_that_of_a_second_trial(
    family: str, dtype: torch.dtype, family_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = []

    class CountedTwin(Twin):
        def __init__(self, *args: object) -> None:
            trials.append(args)
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(file_layout, "Twin", CountedTwin)
    monkeypatch.setattr(file_layout, "_tried", {})
    folder = family_folder(family)
    expected = expected_layout(build_meta_model(folder, torch.bfloat16), LoraSection(r=4, alpha=8, targets=EVERYTHING))
    num_before = len(trials)
    assert num_before
    model = adapt(load_tiny(folder, dtype))
    layout = model.stock_layout()
    assert len(trials) == num_before
    assert layout == replace(expected, merging=None)
    file_layout._tried.clear()
    assert model.stock_layout() == layout
    assert len(trials) > num_before


def test_other_targets_or_ranks_are_tried_by_themselves(family_folder: FolderOf) -> None:
    folder = family_folder("mixtral")
    every = ["w1", "w2", "w3"]
    model = build_meta_model(folder, torch.bfloat16)
    first = expected_layout(model, LoraSection(r=4, targets=every))
    assert expected_layout(model, LoraSection(r=4, targets=["w2"])).target_modules == ["w2"]
    assert expected_layout(model, LoraSection(r=8, targets=every)).r == 8
    first.target_modules.append("of the caller's own")
    assert expected_layout(model, LoraSection(r=4, targets=every)).target_modules == every
