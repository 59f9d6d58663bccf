"""Runs whose expert layers keep gate and up for backward: the same adapter, to the byte in float32, also resumed."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from expertune.experts.module import Nf4Experts
from expertune.run.record import RunRecord
from expertune.train import oom
from expertune.train.trainer import ExpertTrainer
from tests.train.scarce import Scarce, adapter_bytes, run

GATE_UP = f"{2 * 64 * 2 * 2 * 64 * 4}B"
"""Of a layer: two experts for each of the 2 x 64 tokens of a micro-batch, gate and up in float32."""


def words(said: io.StringIO) -> str:
    """What a run has shown, whatever the width."""
    return " ".join(said.getvalue().split())


@pytest.fixture
def values(values: dict[str, Any]) -> dict[str, Any]:
    """The same in four steps, where the plan says how many layers keep them."""
    return values | {"kernels": {"keep": "auto"}, "training": values["training"] | {"max_steps": 4}}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers keep them at each micro-batch's start."""
    seen: list[int] = []
    compute = ExpertTrainer.compute_loss

    def counted(trainer: Any, model: nn.Module, *arguments: Any, **named: Any) -> Any:
        if model.training:
            seen.append(sum(each.layer.keeps for each in model.modules() if isinstance(each, Nf4Experts)))
        return compute(trainer, model, *arguments, **named)

    monkeypatch.setattr(ExpertTrainer, "compute_loss", counted)
    return seen


def test_kept_or_computed_again_the_adapter_has_the_same_bytes_and_the_run_says_how_many_layers_keep(
    values: dict[str, Any], tmp_path: Path, kept: list[int]
) -> None:
    adapters, losses = [], []
    for keep, layers, which in (("auto", 2, "all 2"), (0, 0, None), (GATE_UP, 1, "1 of 2")):
        kept.clear()
        record = run(values, tmp_path / str(keep), kernels={"keep": keep}, said=(said := io.StringIO()))
        assert record["train"]["kept_layers"] == record["plan"]["kept"]["layers"] == layers
        assert set(kept) == {layers}
        assert words(said).count("keeps gate and up of") == bool(which)
        assert not which or f"keeps gate and up of {which} expert layers for backward (" in words(said)
        adapters.append(adapter_bytes(tmp_path / str(keep)))
        losses.append(record["train"]["loss"])
    assert adapters[0] == adapters[1] == adapters[2]
    assert losses[0] == losses[1] == losses[2]


def test_layers_keep_nothing_once_memory_has_run_out_and_batches_stay_as_they_are(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[int]
) -> None:
    undisturbed = run(values, tmp_path / "undisturbed")
    kept.clear()
    scarce = Scarce(0, backward=True, first_layer=4 + 3).install(monkeypatch)  # in the second micro-batch of step 2
    monkeypatch.setattr(scarce, "too_large", lambda _: scarce.trainer.oom.kept_layers > 0)
    recovered = run(values, tmp_path / "recovered", said=(said := io.StringIO()))
    assert scarce.num_failures == 1
    assert kept == [2] * 4 + [0] * 6  # of step 2 both are computed again
    assert [(change["step"], change["setting"]) for change in recovered["train"]["recoveries"]] == [
        (2, {"kept_layers": 0})
    ]
    change = "no expert layer keeps gate and up for backward (2 did), which computes them again"
    assert recovered["train"]["recoveries"][0]["change"] == change
    assert f"; from here on {change}\n" in said.getvalue()
    assert adapter_bytes(tmp_path / "recovered") == adapter_bytes(tmp_path / "undisturbed")
    assert recovered["train"]["loss"] == undisturbed["train"]["loss"]

    # Resumed from the checkpoint of step 2, after the change: it is made again, however much memory there is.
    monkeypatch.undo()
    shutil.copytree(tmp_path / "recovered", tmp_path / "resumed")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "resumed" / name)
    held: list[int] = []
    start_step = oom.OutOfMemory.on_step_begin

    def begin(recovery: oom.OutOfMemory, *arguments: Any, **named: Any) -> None:
        start_step(recovery, *arguments, **named)
        held.append(recovery.kept_layers)

    monkeypatch.setattr(oom.OutOfMemory, "on_step_begin", begin)
    resumed = run(values, tmp_path / "resumed", resume=True, said=(said := io.StringIO()))
    assert held == [0, 0]
    assert " until step 2, where memory ran out, and none from there on" in words(said)
    assert resumed["train"]["recoveries"] == recovered["train"]["recoveries"]
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("recorded", [1, None], ids=["with the number it began with", "of a release that kept none"])
def test_a_resumed_run_keeps_what_it_began_with_whatever_memory_is_free(
    recorded: int | None, values: dict[str, Any], tmp_path: Path, kept: list[int]
) -> None:
    begun = run(values, tmp_path / "run")
    assert begun["train"]["kept_layers"] == 2
    adapter = adapter_bytes(tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    del record["train"]["kept_layers"]
    record.update("train", **({"kept_layers": recorded} if recorded else {}))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    kept.clear()
    resumed = run(values, tmp_path / "run", resume=True)
    assert set(kept) == {recorded or 0}
    assert resumed["train"]["kept_layers"] == resumed["train"]["kept_layers_fewest"] == (recorded or 0)
    assert adapter_bytes(tmp_path / "run") == adapter  # in float32


def test_resumed_with_less_memory_a_run_says_so_and_remembers_what_it_started_with(
    values: dict[str, Any], tmp_path: Path, kept: list[int]
) -> None:
    values |= {"quantization": {**values.get("quantization", {}), "compute_dtype": "bfloat16"}}
    out = tmp_path / "run"
    begun = run(values, out)["plan"]["kept"]
    one_layer = begun["num_bytes"] // begun["layers"]

    def resumed(**changes: Any) -> dict[str, Any]:
        for name in ("adapter", "checkpoint-4"):
            shutil.rmtree(out / name)
        kept.clear()
        train: dict[str, Any] = run(values, out, resume=True, **changes)["train"]
        return train

    train = resumed(memory_budget=str(begun["peak_bytes_without"] + one_layer))
    assert set(kept) == {1}
    assert (train["kept_layers"], train["kept_layers_fewest"]) == (2, 1)
    said = "1 of 2 expert layers keep gate and up, and the run started with 2: 2 would take more than what is free"
    assert any(said in note for note in train["notes"])
    train = resumed()
    assert set(kept) == {2}
    assert (train["kept_layers"], train["kept_layers_fewest"]) == (2, 1)
    assert not any("gate and up" in note for note in train["notes"])
