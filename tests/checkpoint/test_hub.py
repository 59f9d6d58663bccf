"""A model is a folder here or a repository on the hub; anything else is one clear sentence."""

import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import expertune
from expertune.checkpoint.hub import fetch_model, refusal
from expertune.errors import CheckpointError
from expertune.run.draft import draft_run_file
from tests.processes import BENEATH, run_program


def test_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    source = fetch_model(str(tmp_path))
    assert source.folder == tmp_path
    assert source.revision is None


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_model("~/model").folder == tmp_path / "model"


@pytest.mark.parametrize("model", ["./no-such-folder", "/no/such/folder", "~/no-such-folder", "../no-such-folder"])
def test_path_that_is_not_there_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match=f"model {model}: no such folder"):
        fetch_model(model)


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="a file; give the folder that holds the model's files"):
        fetch_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("expertune.partial.json", "this NF4 folder is unfinished; the `expertune quantize` command that started it"),
        ("record.json", "a run directory, not a model; give the model that the run was trained on"),
    ],
)
def test_what_is_no_finished_model_is_called_so_before_its_tokenizer_is_looked_for(
    mark: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / mark).write_text("{}")
    model, data = str(tmp_path), str(tmp_path / "rows.jsonl")
    config = {"model": model, "data": {"train": data}, "output_dir": str(tmp_path / "out")}
    for ask in (
        lambda: draft_run_file(model, data, tmp_path / "run.yaml"),
        lambda: expertune.finetune(config),
        lambda: expertune.plan(config),
        lambda: expertune.examples(config),
        lambda: expertune.load_model(model),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: {says}")):
            ask()


@pytest.mark.parametrize("model", ["one/two/three", "owner/na me", "owner/--name"])
def test_name_that_is_neither_folder_nor_hub_id_is_reported_so(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        fetch_model(model)


def test_hub_model_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(
        CheckpointError, match=r"no folder of this name here.*\(HF_HUB_OFFLINE is set, .*Give the path of a local copy"
    ):
        fetch_model("no-such-owner/no-such-model")


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (GatedRepoError, "its owner grants access, and has not granted it to you"),
        (RepositoryNotFoundError, "it has no such repository, or shows it to others only"),
        (RevisionNotFoundError, "the repository has no such revision"),
        (LocalEntryNotFoundError, "there is no connection to it, and its cache on this machine does not have it"),
        (PermissionError, "PermissionError: no words"),
    ],
)
def test_what_the_hubs_client_says_is_put_into_words(
    refused: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise refused.__new__(refused, "no words")  # what the hub's own errors want besides is an HTTP response

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=rf"the hub did not give it \({reason}\)"):
        fetch_model("owner/name")


def test_what_transformers_says_without_a_connection_is_one_sentence_without_its_advice() -> None:
    theirs = (
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached "
        "files.\n"
        "Check your internet connection or see how to run the library in offline mode at 'https://huggingface.co/docs'."
    )
    assert refusal(OSError(theirs)) == (
        "a file that it needs is not here, and the hub, which may have it, cannot be reached; copy all its files"
    )


FETCH = """
from expertune.checkpoint.hub import fetch_model
for revision in (None, "main"):
    source = fetch_model("owner/name", revision=revision)
    print(source.revision, (source.folder / "config.json").read_text())
"""


def test_model_in_the_hubs_cache_needs_no_connection_and_names_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    places = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert run_program(FETCH, imports=BENEATH, **places).out.split() == [commit, "{}"] * 2
