"""A resumed run repeats what its record says was changed when memory ran out, and ends with the identical adapter."""

import copy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from expertune.errors import DoesNotFitError
from expertune.kernels.routes import KernelSettings, settings_of
from expertune.run.record import RunRecord
from expertune.train import oom
from tests.processes import run_program
from tests.train.scarce import NO_SEQUENCE, ONE_SEQUENCE, Reference, Scarce, adapter_bytes, run


@pytest.fixture
def changed_in_step_4(
    values: dict[str, Any], references: dict[str, tuple[RunRecord, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunRecord, bytes, Path]:
    """A whole run whose micro-batches become smaller in step 4; run once."""
    if "changed" not in references:
        folder = tmp_path_factory.mktemp("changed") / "run"
        with pytest.MonkeyPatch.context() as patch:
            Scarce(ONE_SEQUENCE, first_layer=4 * 3 + 1).install(patch)
            references["changed"] = (run(copy.deepcopy(values), folder), adapter_bytes(folder))
    record, adapter = references["changed"]
    assert [change["step"] for change in record["train"]["recoveries"]] == [4]
    return record, adapter, Path(record["config"]["output_dir"])


@pytest.mark.parametrize(
    ("checkpoint", "layers_before", "scarce_again"),
    [(2, 4, True), (2, 4, False), (4, 0, False)],
    ids=["a step before, as scarce", "a step before, plenty", "at that step, plenty"],
)
def test_resumed_run_changes_at_the_step_where_the_interrupted_one_did(
    checkpoint: int,
    layers_before: int,
    scarce_again: bool,
    values: dict[str, Any],
    changed_in_step_4: tuple[RunRecord, bytes, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, adapter, folder = changed_in_step_4
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for later in range(checkpoint + 2, 7, 2):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    scarce = Scarce(ONE_SEQUENCE, first_layer=layers_before + 1)
    if scarce_again:
        scarce.install(monkeypatch)
    resumed = run(values, tmp_path / "run", resume=True)
    assert scarce.num_failures == 0
    assert adapter_bytes(tmp_path / "run") == adapter
    assert resumed["train"]["loss"] == whole["train"]["loss"]
    assert resumed["train"]["recoveries"] == whole["train"]["recoveries"]


def test_run_killed_after_a_change_has_printed_it_and_resumes_to_the_identical_adapter(
    values: dict[str, Any], changed_in_step_4: tuple[RunRecord, bytes, Path], tmp_path: Path
) -> None:
    _, adapter, _ = changed_in_step_4
    program = f"""
import os, pytest, signal
from expertune import finetune
from expertune.config import parse_config
from expertune.train.callbacks import History
from tests.train.scarce import Scarce

def die(self, args, state, control, **kwargs):
    if state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    Scarce({ONE_SEQUENCE}, first_layer={4 * 3 + 1}).install(pytest.MonkeyPatch())
    History.on_pre_optimizer_step = die
    finetune(parse_config({values | {"output_dir": str(tmp_path / "killed")}!r}))
"""
    ended = run_program(program)
    assert ended.status == -signal.SIGKILL, ended.err
    assert [change["step"] for change in RunRecord.load(tmp_path / "killed")["train"]["recoveries"]] == [4]
    assert "step 4 ran out of memory (Tried to allocate 2.00 GiB); from here on micro-batches of at most" in ended.err
    run(values, tmp_path / "killed", resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter


def test_run_stopped_for_memory_resumes_where_there_is_more(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        Scarce(NO_SEQUENCE, first_layer=4 * 2 + 1).install(patch)  # in step 3
        with pytest.raises(DoesNotFitError):
            run(values, tmp_path / "run")
    resumed = run(values, tmp_path / "run", resume=True)
    assert [step for step, _ in resumed["train"]["loss"]] == [1, 2, 3, 4]
    assert resumed["run"]["status"] == "finished"
    assert adapter_bytes(tmp_path / "run")


def test_resumed_run_repeats_the_changes_of_a_record_of_an_earlier_release(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4}
    whole, before = reference("four")
    shutil.copytree(whole.path.parent, tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    earlier: list[dict[str, Any]] = [
        {"step": 0, "during": "proof", "error": "e", "change": "less", "setting": {"proof_tokens": 16}},
        {"step": 2, "during": "clipping", "error": "e", "change": "memory that nothing uses has been given back"},
        {"step": 3, "during": "training", "error": "e", "change": "less", "setting": {"working_set_bytes": 2**27}},
    ]
    record.update("train", recoveries=earlier)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    changed: list[KernelSettings] = []
    monkeypatch.setattr(oom, "settings_of", lambda model: changed.append(settings_of(model)) or changed[-1])
    resumed = run(values, tmp_path / "run", resume=True)
    assert [settings.working_set_bytes for settings in changed] == [2**27]
    earlier[0] |= {"during": "preflight", "setting": {"preflight_tokens": 16}}
    assert resumed["train"]["recoveries"] == earlier
    assert adapter_bytes(tmp_path / "run") == before
