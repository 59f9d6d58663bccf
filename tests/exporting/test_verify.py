"""Exports are run in their engine: right ones are verified, wrong ones fail and say which tensors disagree."""

import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.experts.module import Nf4Experts
from expertune.exporting import programs
from expertune.exporting.formats import Options, Progress, Verdict
from expertune.exporting.merged import Merged, MergedIntoDequantized
from expertune.exporting.peft import PeftAdapter
from expertune.exporting.source import ExportSource
from expertune.exporting.verify import _Compared, spread, verify, write_verification
from tests.exporting.conftest import nothing

START = programs.start
pytestmark = pytest.mark.usefixtures("copied_processes")
WEIGHTS, EXPERT = "adapter_model.safetensors", "layers.1.block_sparse_moe.experts.2."
Damage = Callable[[dict[str, Tensor]], object]


def swap_w1_and_w3(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".w1." in name]:
        other = name.replace(".w1.", ".w3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def empty_an_expert(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if EXPERT in name and name.endswith("lora_B.weight"):
            tensors[name].zero_()


def halve(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] *= 0.5


def leave_an_expert_out(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if EXPERT in name]:
        del tensors[name]


def transpose_b(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if ".w2.lora_B" in name:
            tensors[name] = tensors[name].T.contiguous()


class Damaged(PeftAdapter):
    """What a wrong writer would write: the right files, and then a change of their tensors."""

    def __init__(self, damage: Damage) -> None:
        super().__init__("peft")
        self.damage = damage

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        super().write(source, folder, progress)
        tensors = load_file(folder / WEIGHTS)
        self.damage(tensors)
        save_file(tensors, folder / WEIGHTS)


def verdict_of(source: ExportSource, form: PeftAdapter | Merged, folder: Path) -> Verdict:
    out = folder / "out"
    out.mkdir()
    form.write(source, out, nothing)
    return verify(source, form, out, source.base.folder)[0]


def test_right_adapter_is_verified_and_its_effect_is_far_above_what_is_allowed(
    mixtral_source: ExportSource, tmp_path: Path
) -> None:
    found = verdict_of(mixtral_source, PeftAdapter("peft"), tmp_path)
    assert (found.verdict, found.reason) == ("verified", None)
    differences = found.figures["differences"]
    assert differences["exported"] < found.figures["tolerance"] == 1e-4 < differences["effect"] / 100
    assert "PEFT 0.2" in found.engine
    assert found.figures["experts"] == {"reached": 8, "of": 8}


@pytest.mark.parametrize(
    ("damage", "disagreeing"),
    [
        (swap_w1_and_w3, ["w1", "w3"]),
        (empty_an_expert, [f"w{w} of model.layers.1.mlp.experts" for w in (1, 3, 2)]),
        (halve, ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w3", "w2"]),
    ],
)
def test_wrong_adapter_fails_and_the_tensors_are_named(
    damage: Damage, disagreeing: list[str], mixtral_source: ExportSource, tmp_path: Path
) -> None:
    found = verdict_of(mixtral_source, Damaged(damage), tmp_path)
    assert found.verdict == "failed"
    assert set(found.disagreeing) == set(disagreeing)
    assert found.reason is not None
    assert found.disagreeing[0] in found.reason


@pytest.mark.parametrize("damage", [leave_an_expert_out, transpose_b])
def test_adapter_that_the_engine_does_not_take_fails(
    damage: Damage, mixtral_source: ExportSource, tmp_path: Path
) -> None:
    found = verdict_of(mixtral_source, Damaged(damage), tmp_path)
    assert found.verdict == "failed"


def test_merged_model_without_one_projection_fails_by_its_name(mixtral_source: ExportSource, tmp_path: Path) -> None:
    class Forgetful(Merged):
        def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
            super().write(source.only(lambda place: place.projection != "down"), folder, progress)

        def engines(self, source, folder, base):  # type: ignore[no-untyped-def]
            [engine] = super().engines(source, folder, base)
            return [type(engine)(**(vars(engine) | {"has_trained": False}))]

    found = verdict_of(mixtral_source, Forgetful(), tmp_path)
    assert (found.verdict, found.disagreeing) == ("failed", ["w2"])


def double_a_block(weight: Tensor) -> None:
    """As a wrong absmax makes it."""
    weight.view(-1)[:64] *= 2


def exchange_blocks(weight: Tensor) -> None:
    blocks = weight.view(-1, 64)
    blocks[:8] = blocks[8:16].clone()


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs run here, for what is changed here to be changed in them."""

    def run(command: Sequence[str], seconds: float) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", list(command[1:]))
        runpy.run_path(command[1], run_name="__main__")
        return 0, ""

    monkeypatch.setattr(programs, "start", run)


@pytest.mark.parametrize("damage", [double_a_block, exchange_blocks])
def test_values_that_were_dequantized_wrongly_fail_in_the_files_alone_and_wherever_they_are_made(
    damage: Callable[[Tensor], None],
    mixtral_source: ExportSource,
    tmp_path: Path,
    one_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = MergedIntoDequantized()
    monkeypatch.setattr(_Compared, "_disagreeing", lambda _: [])
    (tmp_path / "out").mkdir()
    form.write(mixtral_source, tmp_path / "out", nothing)
    [first, *_] = sorted((tmp_path / "out").glob("model-*.safetensors"))
    tensors = load_file(first)
    damage(next(tensor for name, tensor in tensors.items() if ".experts.1.w2." in name))
    save_file(tensors, first, {"format": "pt"})
    [found] = verify(mixtral_source, form, tmp_path / "out", mixtral_source.base.folder)
    assert (found.verdict, found.figures["differences"]["base"]) == ("failed", 0)

    dequantize = Nf4Experts.dequantize

    def wrong(experts: Nf4Experts, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        values = dequantize(experts, expert, projection, dtype)
        if (expert, projection) == (1, "down"):
            damage(values)
        return values

    monkeypatch.setattr(Nf4Experts, "dequantize", wrong)
    (tmp_path / "again").mkdir()
    form.write(mixtral_source, tmp_path / "again", nothing)
    [found] = verify(mixtral_source, form, tmp_path / "again", mixtral_source.base.folder)
    assert found.verdict == "failed"
    assert "the model as it was trained differs" in str(found.reason)


def test_adapter_that_changes_next_to_nothing_proves_nothing(mixtral_source: ExportSource, tmp_path: Path) -> None:
    found = verdict_of(mixtral_source.only(lambda place: False), PeftAdapter("peft"), tmp_path)
    assert found.verdict == "not verified"
    assert "too little to be told" in str(found.reason)


def test_expert_that_no_prompt_is_sent_to_is_said_and_not_counted_as_verified(
    mixtral_source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = mixtral_source.only(lambda place: True)
    monkeypatch.setattr(type(part), "prompts", lambda self: [[5]])
    found = verdict_of(part, PeftAdapter("peft"), tmp_path)
    assert found.verdict == "verified"
    assert found.figures["experts"] == {"reached": 4, "of": 8}
    assert found.reason == "4 of 8 experts of the adapter were not reached by the prompts"


def test_positions_are_chosen_so_that_all_experts_are_reached() -> None:
    routed = torch.tensor([[0, 1]] * 50 + [[2, 3]] + [[0, 1]] * 49)
    assert 50 in spread([routed], 100, 4)
    assert len(spread([routed], 100, 8)) <= 4
    assert spread([], 100, 6) == [0, 50, 99]


@torch.no_grad()
def test_model_that_computes_no_numbers_verifies_nothing(mixtral_source: ExportSource, tmp_path: Path) -> None:
    folder = shutil.copytree(mixtral_source.base.folder, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (out := tmp_path / "out").mkdir()
    form = Damaged(halve)
    form.write(mixtral_source, out, nothing)
    [found, _] = verify(mixtral_source, form, out, folder)
    assert found.verdict == "not verified"
    assert "are not finite" in str(found.reason)
    write_verification(out, form, Options(), mixtral_source, [found])


def test_engine_that_hangs_is_ended_and_nothing_is_verified(
    mixtral_source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "start", START)
    monkeypatch.setenv(programs.TIMEOUT, "0.01")
    found = verdict_of(mixtral_source, PeftAdapter("peft"), tmp_path)
    assert (found.verdict, found.reason) == (
        "not verified",
        f"stock: not done after 0 seconds, and ended; {programs.TIMEOUT} gives it more",
    )


def test_interpreter_that_is_not_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "start", START)
    with pytest.raises(programs.BrokenOffError, match=r"stock: /nowhere/python cannot be started: No such file"):
        programs.run_program("stock.py", {}, tmp_path / "request.json", "stock", 1, "/nowhere/python")
