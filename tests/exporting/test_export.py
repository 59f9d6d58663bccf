"""`expertune export` from a run directory: what it writes and says, and one clear error for what cannot be."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import expertune
from expertune.cli import app, files
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, ExportError, StorageError
from expertune.exporting import programs
from expertune.exporting.formats import Engine, Progress, Verdict
from expertune.exporting.merged import MANIFEST, Merged
from expertune.exporting.peft import PeftAdapter
from expertune.exporting.place import hold_partial
from expertune.exporting.source import ExportSource
from tests.train.conftest import rows_file, run_values, small_mixtral, write_small_mixtral

__all__ = ["rows_file", "run_values", "small_mixtral"]  # fixtures

START = programs.start


@pytest.fixture(scope="module")
def trained(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two large steps, with a checkpoint at the first; tests must not change its directory."""
    values = {
        "model": str(small_mixtral),
        "data": {"train": str(rows_file), "eval": str(rows_file), "template": "{prompt}", "max_length": 64},
        "lora": {"r": 4, "alpha": 8, "targets": ["attention", "experts"]},
        "training": {"max_steps": 2, "save_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 4},
        "output_dir": str(tmp_path_factory.mktemp("trained") / "run"),
    }
    values["data"].pop("template")
    return expertune.finetune(parse_config(values)).output_dir


def engines_of(folder: Path) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = json.loads((folder / "verification.json").read_text())["engines"]
    return engines


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("is_copied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["copied", "started"])
def test_merged_model_is_verified_in_processes_of_its_own_with_its_loss_beside_the_trained_ones(
    is_copied: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_processes: None
) -> None:
    if not is_copied:
        monkeypatch.setattr(programs, "start", START)
    arguments = ["export", str(trained), "--to", "merged", "--base", "dequantized", "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, [*arguments, "--json"])
    assert ended.exit_code == 0, ended.output
    exported = json.loads(ended.stdout)
    assert exported["folder"] == str(tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert exported["verification"] == json.loads((tmp_path / "out" / "verification.json").read_text())
    [engine] = exported["verification"]["engines"]
    assert engine["verdict"] == "verified"
    loss = engine["figures"]["loss"]
    assert loss["exported"] == pytest.approx(loss["trained"], abs=1e-2)
    assert loss["exported"] < loss["base"]
    assert f"{loss['exported']:.4f} merged" in ended.stderr


def test_earlier_state_goes_into_a_folder_of_its_name_and_nothing_is_run_unasked(copied: Path) -> None:
    exported = expertune.export(copied, "peft", adapter="checkpoint-1", verify=False)
    assert exported.folder == copied / "exports" / "peft-checkpoint-1"
    assert exported.verification is None
    first = load_file(exported.folder / "adapter_model.safetensors")
    last = load_file(expertune.export(copied, "peft", verify=False).folder / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert any((first[name] != last[name]).any() for name in first)
    assert [path.name for path in (copied / "exports").iterdir() if "partial" in path.name] == []


def test_wrong_export_ends_with_2_and_stays_beside_its_place_with_what_came_of_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch, copied_processes: None
) -> None:
    write = PeftAdapter.write

    def damaged(form: PeftAdapter, source: ExportSource, folder: Path, progress: Progress) -> None:
        write(form, source, folder, progress)
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in tensors:
            tensors[name] *= -1 if "layers.0.self_attn.q_proj.lora_B" in name else 1
        save_file(tensors, folder / "adapter_model.safetensors")

    monkeypatch.setattr(PeftAdapter, "write", damaged)
    ended = CliRunner().invoke(app, ["export", str(copied), "--to", "peft"])
    assert ended.exit_code == 2
    assert "computes something else" in ended.stderr
    assert "q_proj of model.layers.0" in " ".join(ended.stderr.split())
    assert [path.name for path in (copied / "exports").iterdir()] == ["peft.partial"]
    assert engines_of(copied / "exports" / "peft.partial")[0]["verdict"] == "failed"
    monkeypatch.undo()
    expertune.export(copied, "peft", verify=False)
    assert sorted(path.name for path in (copied / "exports").iterdir()) == ["peft"]
    assert engines_of(copied / "exports" / "peft") == []


def test_export_that_has_moved_is_verified_again_and_its_card_says_what_came_of_it(
    copied: Path, tmp_path: Path, copied_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expertune.export(copied, "peft", verify=False)
    moved = (copied / "exports" / "peft").rename(tmp_path / "moved")
    before = sorted(path.name for path in moved.iterdir())
    ended = CliRunner().invoke(app, ["verify", str(moved)])
    assert ended.exit_code == 2
    assert "moved: lies in no run directory; give the run that it is of with --run RUN_DIR" in ended.output
    (moved / ".scratch-of-one-that-was-killed").mkdir()
    shown: list[str] = []
    monkeypatch.setattr(files, "working", lambda what: shown.append(what) or nullcontext())
    ended = CliRunner().invoke(app, ["verify", str(moved), "--run", str(copied)])
    assert ended.exit_code == 0, ended.output
    assert shown == [f"verifying {moved}"]
    verdicts = [f"{each['engine']}: {each['verdict']}" for each in engines_of(moved)]
    assert verdicts[0].endswith("): verified")
    assert [ended.output.count(each) for each in verdicts] == [1] * len(verdicts)
    assert all(each in ended.stdout for each in verdicts)
    assert engines_of(moved)[0]["verdict"] == "verified"
    assert "| verified |" in (moved / "README.md").read_text()
    tensors = load_file(moved / "adapter_model.safetensors")
    tensors = {name: tensor * (-1 if ".w1.lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(tensors, moved / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"not as they were written\. .*verification\.json has what was found"):
        expertune.verify(moved, copied)
    assert engines_of(moved)[0]["verdict"] == "failed"
    assert sorted(path.name for path in moved.iterdir()) == before


def test_folder_that_no_export_has_written_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no verification\.json here; give one that `expertune export` has"):
        expertune.verify(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"adapter": 5},
        {"format": ["peft"]},
        {"options": {"base": 5}},
        {"options": {"type": 5}},
        {"options": 5},
        {"hub": 5},
        {"hub": "a b\n"},
    ],
    ids=str,
)
def test_verification_that_does_not_say_what_was_exported_is_one_error(damage: dict[str, Any], tmp_path: Path) -> None:
    said = {"format": "merged", "options": {"base": "source", "type": None}, "adapter": "adapter"}
    (tmp_path / "verification.json").write_text(json.dumps(said | damage))
    with pytest.raises(ExportError, match=r"verification\.json: does not say what was exported; export the run again"):
        expertune.verify(tmp_path)


def test_links_in_a_received_export_are_not_written_through(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = expertune.export(copied, "peft", verify=False).folder
    (mine := tmp_path / "mine").write_text("kept")
    (folder / ".export.json").symlink_to(mine)
    with pytest.raises(ConfigError, match=r"\.export\.json: a link, and what it leads to would be written over"):
        expertune.verify(folder)
    (folder / ".export.json").unlink()
    monkeypatch.setattr("expertune.exporting.export.run_engines", lambda *_: [])
    (tmp_path / "card").write_text((folder / "README.md").read_text())
    (tmp_path / "found").write_text((folder / "verification.json").read_text())
    before = [path.read_text() for path in sorted(tmp_path.iterdir()) if path.is_file()]
    for name, target in (("README.md", "card"), ("verification.json", "found")):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / target)
    expertune.verify(folder)
    assert [path.read_text() for path in sorted(tmp_path.iterdir()) if path.is_file()] == before
    assert not any(path.is_symlink() for path in folder.iterdir())


def remove_the_adapter(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def damage_the_adapter(run: Path) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    name = next(name for name in tensors if ".experts.1.w2.lora_A" in name)
    del tensors[name]
    save_file(tensors, run / "adapter" / "adapter_model.safetensors")


def damage_an_adapter_of_an_earlier_release(run: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    del record["adapter"]["sha256"]
    (run / "record.json").write_text(json.dumps(record))
    damage_the_adapter(run)


def fill_the_folder(run: Path) -> None:
    (run / "exports" / "peft").mkdir(parents=True)
    (run / "exports" / "peft" / "notes.txt").write_text("mine")


def move_the_base(run: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    record["config"]["model"] = "/nowhere/base"
    (run / "record.json").write_text(json.dumps(record))


Change = Callable[[Path], None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove_the_adapter, CheckpointError, r"run/adapter: no such adapter.*checkpoint-1, checkpoint-2"),
        (damage_the_adapter, CheckpointError, r"run/adapter: damaged: adapter_model\.safetensors is not the file"),
        (damage_an_adapter_of_an_earlier_release, CheckpointError, r"experts\.1\.w2\.lora_A\.weight is missing"),
        (fill_the_folder, ExportError, r"exports/peft: holds something already; give a new.*--out DIR"),
        (move_the_base, CheckpointError, r"/nowhere/base: no such folder.*--model MODEL"),
    ],
)
def test_what_is_missing_is_one_error_and_nothing_is_written(
    change: Change, error: type[Exception], message: str, copied: Path
) -> None:
    change(copied)
    before = sorted(copied.rglob("*"))
    with pytest.raises(error, match=message):
        expertune.export(copied, "peft")
    assert sorted(copied.rglob("*")) == before


def test_adapter_of_another_base_is_refused(copied: Path, tmp_path: Path) -> None:
    other = write_small_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"was trained on another base model than .*other: other weights"):
        expertune.export(copied, "merged", model=str(other))


def test_adapter_of_another_run_is_refused(copied: Path) -> None:
    record = json.loads((copied / "record.json").read_text(encoding="utf-8"))
    record["config"]["lora"]["r"] = 64
    (copied / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"was trained with lora\.r \d+, and the record of this run says 64"):
        expertune.export(copied, "peft")


def test_disk_that_is_too_small_is_said_before_anything_is_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(StorageError, match=r"the export needs .* MB, and 1 kB are free; make room"):
        expertune.export(copied, "merged")
    assert not (copied / "exports").exists()


def test_room_that_only_the_comparison_needs_is_said_before_anything_is_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Merged, "nbytes_to_verify", lambda *_: 2**60)
    with pytest.raises(
        StorageError, match=r"comparing it needs .* for a while.*leave the comparison out with --no-verify"
    ):
        expertune.export(copied, "merged")
    assert not (copied / "exports").exists()


@pytest.mark.parametrize(("asked", "message"), [("pefft", "did you mean peft"), ("onnx", "known: ")])
def test_format_that_there_is_not_is_refused_by_name(asked: str, message: str, copied: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--to {asked}: no such format.*{message}"):
        expertune.export(copied, asked)


@pytest.mark.parametrize(
    ("asked", "says"),
    [(["onnx"], "--to onnx: no such format"), (["gguf", "--type", "q4_k_m"], "--type q4_k_m: --to gguf writes f32")],
)
def test_command_refuses_a_format_before_it_imports_torch(asked: list[str], says: str, tmp_path: Path) -> None:
    code = "import sys; from expertune.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code, "export", str(tmp_path), "--to", *asked],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "False\n"
    assert says in ended.stderr


def test_second_export_to_the_same_folder_is_refused_while_the_first_writes(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold_partial(out) as partial:
        (partial / "first.txt").write_text("first")
        with pytest.raises(ConfigError, match=r"out\.partial: process \d+ .* is writing an export here.*another --out"):
            expertune.export(copied, "peft", out=out, verify=False)
        assert (partial / "first.txt").read_text() == "first"
    expertune.export(copied, "peft", out=out, verify=False)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "verification.json"}
    assert {path.name for path in out.iterdir()} == names
    assert not partial.exists()


def test_neighbor_folder_that_no_export_has_made_is_left_alone(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"out\.partial: no export has written it"):
        expertune.export(copied, "peft", out=tmp_path / "out", verify=False)
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_places_that_cannot_be_taken_are_refused_by_name(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for out, message in (
        (".", r"here: the working directory.*--out DIR"),
        ("../file/in", r"/file: a file; give a new"),
    ):
        with pytest.raises(ExportError, match=message):
            expertune.export(copied, "peft", out=out, verify=False)


class Failing(Merged):
    """A format whose engine finds it wrong."""

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        return [Engine("engine", "", None, {}, verdict=lambda *_: Verdict("engine", "failed", "w1 disagrees"))]


def test_failed_export_is_kept_beside_its_place_and_its_verdict_does_not_go_into_the_next(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertune.exporting.export.make_format", lambda *_: Failing())
    out = tmp_path / "out"
    arguments = ["export", str(copied), "--to", "merged", "--out", str(out)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert "computes something else from this export: w1 disagrees" in ended.output
    assert not out.exists()
    assert [engine["verdict"] for engine in engines_of(tmp_path / "out.partial")] == ["failed"]
    with pytest.raises(ExportError, match="w1 disagrees"):
        expertune.verify(tmp_path / "out.partial", copied)
    (tmp_path / "out.partial" / ".scratch-of-one-that-was-killed").mkdir()
    assert CliRunner().invoke(app, [*arguments, "--no-verify"]).exit_code == 0
    assert engines_of(out) == []
    assert not list(out.glob(".*"))
    assert not (tmp_path / "out.partial").exists()
