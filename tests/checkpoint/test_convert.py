"""Tensors that transformers converts: read an expert at a time, complete, or one error that names what is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from expertune.checkpoint.reader import Memory, TensorEntry
from expertune.errors import CheckpointError
from tests.families.build import tiny_config
from tests.tiny_models import load_tiny, save_random


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[str, Callable[[dict[str, Tensor]], object]], Path]:
    """A family's folder as stock transformers wrote it, some of its tensors changed."""

    def rewrite(kind: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = save_random(tmp_path / kind, tiny_config(kind))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return rewrite


Rewritten = Callable[[str, Callable[[dict[str, Tensor]], object]], Path]


def key_of(tensors: dict[str, Tensor], *parts: str) -> str:
    """The first name that holds all the parts."""
    return next(name for name in sorted(tensors) if all(part in name for part in parts))


ALTERNATING = pytest.mark.skipif(
    "inkling2_text" not in CONFIG_MAPPING, reason="inkling2_text is not in this release of transformers (5.20) yet"
)
STACKS = ["qwen3_vl_moe", "inkling_text", "inkling2_text", "gpt_oss", "aria_text"]


# transformers 5.20 does not have all of them yet.
@pytest.mark.parametrize("kind", [kind for kind in STACKS if kind in CONFIG_MAPPING])
def test_stack_of_experts_is_never_read_whole(kind: str, rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rewritten(kind, lambda tensors: None)
    read, whole = TensorEntry.read, []

    def noted(entry: TensorEntry, *memory: Memory) -> Tensor:
        if len(entry.shape) == 3 and entry.shape[0] == 4 and min(entry.shape[1:]) >= 64:
            whole.append(entry.key)
        return read(entry, *memory)

    monkeypatch.setattr(TensorEntry, "read", noted)
    load_tiny(folder)
    shared = [key for key in whole if "shared" not in key]
    assert shared == []


def test_part_of_a_tensor_that_is_joined_from_several_is_missed(rewritten: Rewritten) -> None:
    folder = rewritten("kimi_linear", lambda tensors: tensors.pop(key_of(tensors, "k_conv1d")))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*_conv1d\.weight is only read.*k_conv"):
        load_tiny(folder)


def test_all_parts_of_a_joined_tensor_are_missed_by_the_name_of_the_whole(rewritten: Rewritten) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_conv1d" in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"missing tensors: .*conv1d\.weight"):
        load_tiny(rewritten("kimi_linear", drop))


def test_expert_that_is_missing_from_a_shared_list_is_missed(rewritten: Rewritten) -> None:
    folder = rewritten("ernie4_5_vl_moe", lambda tensors: tensors.pop(key_of(tensors, "experts.3.gate_proj")))
    with pytest.raises(CheckpointError, match=r"is only read together with those called .*gate_proj.* 7 instead of 8"):
        load_tiny(folder)


@ALTERNATING
def test_stack_of_too_few_experts_is_refused_by_its_shape(rewritten: Rewritten) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = key_of(tensors, "experts", "w13_weight")
        tensors[name] = tensors[name][:3].contiguous()

    with pytest.raises(CheckpointError, match=r"w13_weight has shape \(3, .*\), expected 4 experts first"):
        load_tiny(rewritten("inkling2_text", cut))


@ALTERNATING
def test_converted_stack_of_another_width_is_refused(rewritten: Rewritten) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        name = key_of(tensors, "experts", "w13_weight")
        tensors[name] = tensors[name][:, :, :32].contiguous()

    with pytest.raises(CheckpointError, match=r"w13_weight: expected shape \(64, 64\), got \(64, 32\)"):
        load_tiny(rewritten("inkling2_text", narrow))


@pytest.mark.parametrize("kind", ["gpt_oss", "aria_text"])
def test_stack_in_the_other_layout_is_refused(kind: str, rewritten: Rewritten) -> None:
    def turn(tensors: dict[str, Tensor]) -> None:
        name = key_of(tensors, "gate_up_proj") if kind == "gpt_oss" else key_of(tensors, "experts", "fc1")
        tensors[name] = tensors[name].transpose(1, 2).contiguous()

    with pytest.raises(CheckpointError, match=r"expected shape \(\d+, 64\), got"):
        load_tiny(rewritten(kind, turn))


def test_bias_that_is_missing_is_named_as_on_disk(rewritten: Rewritten) -> None:
    folder = rewritten("gpt_oss", lambda tensors: tensors.pop(key_of(tensors, "layers.0", "down_proj_bias")))
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.0\.mlp\.experts\.down_proj_bias$"):
        load_tiny(folder)


def test_norm_after_experts_that_is_missing_is_named(rewritten: Rewritten) -> None:
    folder = rewritten("muse_spark", lambda tensors: tensors.pop(key_of(tensors, "post_expert_norm")))
    with pytest.raises(CheckpointError, match=r"missing tensors: .*post_expert_norm\.weight$"):
        load_tiny(folder)


def test_bias_that_is_not_finite_is_refused(rewritten: Rewritten) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[key_of(tensors, "gate_up_proj_bias")][0, 0] = torch.nan

    with pytest.raises(CheckpointError, match=r"gate_up_proj_bias holds NaN"):
        load_tiny(rewritten("gpt_oss", spoil))
