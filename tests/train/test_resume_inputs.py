"""What a resumed run must find as it was: its inputs by content, its record, its best checkpoint, its manifests."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import expertune
from expertune import finetune, open_run
from expertune.checkpoint import adapter_folder
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, DataError, ExpertuneError
from expertune.run.record import RunRecord
from expertune.train import saving
from expertune.train.checkpoints import MANIFEST_NAME, find_resume_point, seal
from tests.train.conftest import nine_steps
from tests.train.scarce import adapter_bytes

TOKEN = "hf_ThisIsNobodysToken"


# --- inputs, by content -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a template, rows and a run of them, in two steps; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(small_mixtral, folder / "model")
    (folder / "own.jinja").write_text("Q: {{ prompt }}\nA: {{ completion }}", encoding="utf-8")
    shutil.copy(rows_file, folder / "rows.jsonl")
    finetune(parse_config(values_in(folder)))
    return folder


@pytest.fixture(scope="module")
def unfinished(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one step left; tests must not change it."""
    folder = copied(finished, tmp_path_factory.mktemp("unfinished") / "copy")
    record = RunRecord.load(folder / "run")
    record.update("run", status="running")
    shutil.rmtree(folder / "run" / "adapter")
    shutil.rmtree(folder / "run" / "checkpoint-2")
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A folder with all that a run reads and has written, copied; its record names what lies in the copy."""
    shutil.copytree(folder, to)
    path = to / "run" / "record.json"
    path.write_text(path.read_text(encoding="utf-8").replace(str(folder), str(to)), encoding="utf-8")
    return to


def values_in(folder: Path) -> dict[str, Any]:
    values = nine_steps(folder / "model", folder / "rows.jsonl", folder / "run")
    values["data"] |= {"template": str(folder / "own.jinja")}
    values["training"] |= {"max_steps": 2, "save_steps": 1, "eval_strategy": "no", "hub_token": TOKEN}
    values["training"] |= {"report_to": "tensorboard"}
    return values


def another_weight(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1.0
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def another_token(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    first, second = list(values["model"]["vocab"])[500:502]
    vocabulary = values["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values), encoding="utf-8")


def another_template(folder: Path) -> None:
    (folder / "own.jinja").write_text("Question: {{ prompt }}\nA: {{ completion }}", encoding="utf-8")


def another_row(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("plus", "and"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (another_weight, CheckpointError, r"model .*model is not the one that the run started with: .*weights"),
        (another_token, CheckpointError, r"the tokenizer of .* has changed since the run started"),
        (another_template, ConfigError, r"data\.template: .*own\.jinja has changed since the run started"),
        (another_row, DataError, r"data\.train: rows\.jsonl has changed"),
    ],
)
def test_resume_over_another_input_under_the_same_name_is_refused(
    change: Any, error: type[ExpertuneError], message: str, unfinished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unfinished, folder)
    change(folder)
    before = (folder / "run" / "record.json").read_bytes()
    with pytest.raises(error, match=f"resume: {message}"):
        finetune(parse_config(values_in(folder)), resume=True)
    assert (folder / "run" / "record.json").read_bytes() == before


def test_resume_over_another_slice_of_the_same_file_is_refused(unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unfinished, folder)
    values = values_in(folder)
    values["data"] |= {"train": f"{folder / 'rows.jsonl'}[1:20]"}
    with pytest.raises(DataError, match=r"resume: data\.train: its rows are not read or encoded as they were"):
        finetune(parse_config(values), resume=True)


def test_run_and_its_inputs_that_were_moved_resume_to_the_same_adapter(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stays", "moved"):
        shutil.copytree(unfinished, tmp_path / name)
    finetune(parse_config(values_in(tmp_path / "stays")), resume=True)
    monkeypatch.chdir(tmp_path / "moved")
    values = values_in(Path())  # every path is another, and relative
    finetune(parse_config(values), resume=True)
    assert adapter_bytes(tmp_path / "moved" / "run") == adapter_bytes(tmp_path / "stays" / "run")


def test_secret_of_the_run_file_is_in_no_file_of_the_run(unfinished: Path) -> None:
    files = [path for path in (unfinished / "run").rglob("*") if path.is_file()]
    assert {"record.json", "trainer_state.json", "optimizer.pt"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in unfinished.rglob("*"))
    assert [str(path) for path in unfinished.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
    assert "hub_token" not in RunRecord.load(unfinished / "run")["config"]["training"]
    assert not [path for path in files if path.suffix == ".bin"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"record\.json: missing, though .* start a new run with .*lora\.init_from=\S+checkpoint-"),
        ("{", r"record\.json: cannot be read as JSON.*start a new run with another output_dir"),
    ],
)
def test_run_over_checkpoints_without_a_sound_record_has_one_advice_with_and_without_resume(
    content: str | None, message: str, resume: bool, unfinished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(unfinished, folder)
    record = folder / "run" / "record.json"
    record.unlink()
    if content is not None:
        record.write_text(content, encoding="utf-8")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        finetune(parse_config(values_in(folder)), resume=resume)
    assert sorted(path for path in folder.rglob("*") if path.name != ".lock.json") == before


# --- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best_first(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best checkpoint (by a metric read upside down) is its first; tests must not change it."""
    folder = tmp_path_factory.mktemp("best")
    finetune(parse_config(best_values(small_mixtral, rows_file, folder / "run")))
    assert adapter_bytes(folder / "run") == checkpoint_bytes(folder / "run", 3)
    assert adapter_bytes(folder / "run") != checkpoint_bytes(folder / "run", 9)
    return folder / "run"


def best_values(model: Path, rows: Path, run_dir: Path) -> dict[str, Any]:
    values = nine_steps(model, rows, run_dir)
    values["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    return values


def checkpoint_bytes(run_dir: Path, step: int) -> bytes:
    return (run_dir / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


def reopened(run_dir: Path, copy: Path) -> Path:
    """A copy of a run that looks as if it had been killed after its second checkpoint."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoint-9")
    return copy


def damage(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def test_run_folder_that_was_moved_and_is_named_otherwise_keeps_its_best_checkpoint(
    best_first: Path, small_mixtral: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reopened(best_first, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    finetune(parse_config(best_values(small_mixtral, rows_file, Path("moved"))), resume=True)
    assert adapter_bytes(tmp_path / "moved") == adapter_bytes(best_first)


def test_best_checkpoint_that_is_damaged_before_the_end_stops_the_run_which_resumes_to_the_same(
    best_first: Path, small_mixtral: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = reopened(best_first, tmp_path / "run")
    publish = saving.publish

    def publish_and_damage(staged: Path, to: Path) -> Path:
        damage(to / "checkpoint-3")
        return publish(staged, to)

    values = best_values(small_mixtral, rows_file, run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "publish", publish_and_damage)
        with pytest.raises(CheckpointError, match=r"the best checkpoint cannot be taken .*checkpoint-3: damaged"):
            finetune(parse_config(values), resume=True)
    assert RunRecord.load(run_dir)["run"]["status"] == "stopped"
    assert not (run_dir / "adapter").exists()

    finetune(parse_config(values), resume=True)

    assert adapter_bytes(run_dir) == adapter_bytes(best_first)
    notes = RunRecord.load(run_dir)["train"]["notes"]
    assert any("checkpoint-9: the best checkpoint so far was checkpoint-3" in note for note in notes)


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / name).write_text(json.dumps({"global_step": step, "of": name}), encoding="utf-8")
        seal(folder)
    return tmp_path


@pytest.mark.parametrize("bit", range(8))
def test_any_bit_flipped_in_a_manifest_gives_the_checkpoint_before(bit: int, two_checkpoints: Path) -> None:
    path = two_checkpoints / "checkpoint-2" / MANIFEST_NAME
    written = path.read_bytes()
    for at in range(len(written)):
        flipped = bytearray(written)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        point = find_resume_point(two_checkpoints)
        assert point.checkpoint == two_checkpoints / "checkpoint-1", flipped
        assert "checkpoint-2: damaged" in point.refused[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": null}',
        b'{"a": {"bytes": 1}}',
        b'{"../a": {"bytes": 0, "sha256": ""}}',
        b'{"": {"bytes": 0, "sha256": ""}}',
        b'{"a\\u0000": [1, 2]}',
    ],
)
def test_manifest_of_any_other_content_gives_the_checkpoint_before(content: bytes, two_checkpoints: Path) -> None:
    (two_checkpoints / "checkpoint-2" / MANIFEST_NAME).write_bytes(content)
    point = find_resume_point(two_checkpoints)
    assert point.checkpoint == two_checkpoints / "checkpoint-1"
    assert "checkpoint-2: damaged" in point.refused[0]


def test_file_that_a_manifest_does_not_name_is_damage(two_checkpoints: Path) -> None:
    path = two_checkpoints / "checkpoint-2" / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["optimizer.pt"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert "does not name optimizer.pt" in find_resume_point(two_checkpoints).refused[0]


def another_factor(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def start_from(folder: Path, adapter: Path) -> dict[str, Any]:
    """The values of a second run, from an adapter of the first."""
    values = values_in(folder) | {"output_dir": str(folder / "second"), "lora": {"init_from": str(adapter)}}
    values["training"] |= {"max_steps": 1}
    return values


def base_of(folder: Path) -> PreTrainedModel:
    return expertune.load_model(folder / "model", "float32", "cpu")


USES: dict[str, Callable[[Path, str], object]] = {
    "open_run": lambda folder, name: open_run(folder / "run", name if name != "adapter" else None),
    "export": lambda folder, name: expertune.export(folder / "run", "peft", adapter=name, verify=False),
    "lora.init_from": lambda folder, name: finetune(start_from(folder, folder / "run" / name)),
    "load_adapter": lambda folder, name: expertune.load_adapter(base_of(folder), folder / "run" / name),
    "attach": lambda folder, name: expertune.attach(base_of(folder), init_from=str(folder / "run" / name)),
}

REMEDIES = {
    "open_run": r"--adapter checkpoint-N .* copy it out .* lora\.init_from, .* expertune\.load_adapter$",
    "export": r"--adapter checkpoint-N .* copy it out .* lora\.init_from, .* expertune\.load_adapter$",
    "lora.init_from": r"start from another state of the run; a copy outside .* is taken as it is$",
    "load_adapter": r"load another state of the run; a copy outside .* is taken as it is$",
    "attach": r"load another state of the run; a copy outside .* is taken as it is$",
}


@pytest.mark.parametrize("name", ["adapter", "checkpoint-1"])
@pytest.mark.parametrize("use", USES)
def test_damaged_weights_of_an_adapter_are_refused_wherever_it_is_used(
    finished: Path, tmp_path: Path, use: str, name: str
) -> None:
    folder = copied(finished, tmp_path / "copy")
    another_factor(folder / "run" / name)
    with pytest.raises(
        CheckpointError, match=rf"{name}: damaged: adapter_model\.safetensors is not the file"
    ) as refused:
        USES[use](folder, name)
    assert re.search(REMEDIES[use], str(refused.value)), refused.value


@pytest.mark.parametrize("use", ["lora.init_from", "load_adapter"])
def test_changed_adapter_is_taken_as_it_is_from_outside_of_its_run(finished: Path, tmp_path: Path, use: str) -> None:
    folder = copied(finished, tmp_path / "copy")
    another_factor(folder / "run" / "adapter")
    (folder / "run" / "adapter").rename(folder / "adapter")
    USES[use](folder, "../adapter")


def test_damaged_weights_are_refused_by_the_name_of_a_link_too(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "copy")
    (folder / "best").symlink_to(folder / "run" / "adapter")
    another_factor(folder / "best")
    with pytest.raises(CheckpointError, match=r"best: damaged: adapter_model\.safetensors is not the file"):
        finetune(start_from(folder, folder / "best"))


def test_damaged_adapter_of_a_finished_run_is_told_at_resume_and_written_again_from_its_last_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path / "copy")
    another_factor(folder / "run" / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter: damaged: .* restore it, or remove the folder"):
        finetune(values_in(folder), resume=True)
    shutil.rmtree(folder / "run" / "adapter")
    finetune(values_in(folder), resume=True)
    assert adapter_bytes(folder / "run") == adapter_bytes(finished / "run")


def test_adapter_that_was_taken_out_of_its_run_is_used_as_it_is(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "copy")
    shutil.copytree(folder / "run" / "adapter", tmp_path / "adapter")
    another_factor(tmp_path / "adapter")
    finetune(start_from(folder, tmp_path / "adapter"))
    assert (folder / "second" / "adapter").is_dir()


def test_adapter_to_start_from_is_hashed_once(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hashed = copied(finished, tmp_path / "copy"), []
    original = adapter_folder.hash_file
    monkeypatch.setattr(adapter_folder, "hash_file", lambda path: hashed.append(path) or original(path))
    start = folder / "run" / "adapter"
    finetune(start_from(folder, start))
    names = [path.name for path in hashed if path.parent == start]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "adapter_live.tensors"]
