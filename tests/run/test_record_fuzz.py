"""Records that no run wrote: whatever a section holds, what reads a run ends in one error that names the file."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import expertune
from expertune.errors import CheckpointError, ExpertuneError
from tests.examples import examples
from tests.train.conftest import nine_steps, rows_file, small_mixtral

__all__ = ["rows_file", "small_mixtral"]  # fixtures

VALUES: list[Any] = [None, 5, -1, 0.5, True, "", "text", [], [5], {}, {"train": 5}, {"places": 5}]


@pytest.fixture(scope="module")
def finished(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, without memory having run out."""
    folder = tmp_path_factory.mktemp("records") / "run"
    values = nine_steps(small_mixtral, rows_file, folder)
    values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    expertune.finetune(expertune.config.parse_config(values))
    shutil.copy(folder / "record.json", folder.parent / "kept.json")
    return folder


def places(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a record holds values, three levels deep; those of the plan and the versions are read by nobody."""
    if isinstance(values, dict) and len(path) < 3:
        for key, value in values.items():
            if path != ("plan",) and path != ("versions",) and key != "format_version":
                yield (*path, key)
                yield from places(value, (*path, key))


def with_value(folder: Path, path: tuple[str, ...], value: Any) -> None:
    """Write the run's record with another value in one place."""
    record = json.loads((folder.parent / "kept.json").read_text(encoding="utf-8"))
    here = record
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = copy.deepcopy(value)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def read_in_every_way(folder: Path) -> list[ExpertuneError]:
    """The errors of what reads a record: to answer a prompt, to evaluate, to start again, to resume."""
    errors = []
    for read in (
        lambda: expertune.generate(folder, "What is 1 plus 2?", max_new_tokens=1),
        lambda: expertune.evaluate(folder),
        lambda: expertune.load_config(folder, ["output_dir=second"]),
        lambda: expertune.finetune(folder, resume=True),
    ):
        try:
            read()
        except ExpertuneError as error:
            errors.append(error)
    return errors


@pytest.mark.parametrize("value", [None, 5])
@pytest.mark.parametrize("section", ["run", "model", "data", "kernels", "train", "placement"])
def test_record_whose_section_is_no_mapping_is_refused_by_file_and_section(
    section: str, value: Any, finished: Path
) -> None:
    with_value(finished, (section,), value)
    errors = read_in_every_way(finished)
    assert len(errors) == 4
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert str(error).startswith(f"{finished / 'record.json'}: damaged at {section}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("processes", 0), ("global_batch", "4"), ("experts", "spread"), ("processes_sharing_experts", True)],
)
def test_record_of_several_processes_that_holds_something_else_is_refused_by_its_key(
    key: str, value: Any, finished: Path
) -> None:
    with_value(finished, ("train", key), value)
    with pytest.raises(CheckpointError, match=rf"record\.json: damaged at train\.{key}: "):
        expertune.open_run(finished)


def test_answers_of_a_record_without_its_rows_report_are_refused(finished: Path) -> None:
    with_value(finished, ("data",), {})
    for read in (lambda: expertune.generate(finished, "What?"), lambda: expertune.evaluate(finished)):
        with pytest.raises(CheckpointError, match=r"record\.json: it holds no data\.train"):
            read()


@given(data=st.data())
@examples(25)
def test_record_of_any_values_is_read_or_refused_with_one_error(finished: Path, data: st.DataObject) -> None:
    kept = json.loads((finished.parent / "kept.json").read_text(encoding="utf-8"))
    with_value(finished, data.draw(st.sampled_from(sorted(places(kept)))), data.draw(st.sampled_from(VALUES)))
    assert all(str(error) for error in read_in_every_way(finished))  # an error of another type is not caught
