"""The fields of TrainingArguments as their source is read are those of the class."""

import dataclasses
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import TrainingArguments

from expertune.config import check_training_arguments, training_fields
from expertune.config.training_fields import fields_of
from expertune.errors import ConfigError


def said(hint: Any) -> Any:
    """A type with its enumerations as their values, so that two of one content are equal."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return frozenset(each.value for each in hint)
    return frozenset(map(said, parts)) if (parts := get_args(hint)) else hint


def test_names_types_and_defaults_in_the_source_are_those_of_the_class() -> None:
    read, real = training_fields._read(), fields_of(TrainingArguments)
    assert read is not None
    assert read.known == real.known
    types = {name: said(real.types[name]) for name in read.types}
    assert {name: said(hint) for name, hint in read.types.items()} == types
    assert {name: real.defaults[name] for name in read.defaults} == read.defaults
    # What is left to the class: a type of accelerate's, and a default that depends on torch's release.
    assert real.known - read.types.keys() <= {"parallelism_config"}
    assert real.known - read.defaults.keys() <= {"optim", "include_for_metrics"}


def test_what_the_source_does_not_tell_is_looked_up_in_the_class() -> None:
    read = training_fields.training_fields()
    assert read.default_of("optim") == TrainingArguments.optim
    assert read.default_of("include_for_metrics") is dataclasses.MISSING
    assert type(None) in get_args(read.type_of("parallelism_config"))


@pytest.mark.parametrize(
    "source", ["", "class TrainingArguments(Other):\n    seed: int = 1\n", "def broken(:\n", "\0", "(" * 9999]
)
def test_source_of_another_form_gives_way_to_the_class(source: str, read_from: Callable[[str, str], None]) -> None:
    for name in training_fields._FILES:
        read_from(name, source)
    assert training_fields.training_fields() == fields_of(TrainingArguments)
    with pytest.raises(ConfigError, match=r"training\.learning_rate: has to be a number"):
        check_training_arguments({"learning_rate": "abc"})


CLASS = "class TrainingArguments:\n    learning_rate: float = 0.1\n"


@pytest.mark.parametrize(
    "line",
    [
        "num_train_epochs: int[str] = 3",
        "num_train_epochs: Literal[tuple(1)] = 3",
        'num_train_epochs: list["Other"] = 3',
        "num_train_epochs: float = {[]: 1}",
        "num_train_epochs: float = make(default=7)",
        "num_train_epochs: float = 7\n    num_train_epochs = 3",
        "num_train_epochs: float",
        "num_train_epochs: float = field(init=bool(1), default=7)",
        "if True:\n        num_train_epochs: float = 7",
        "pass",
    ],
)
def test_what_cannot_be_read_of_one_field_is_what_the_class_says(
    line: str, read_from: Callable[[str, str], None]
) -> None:
    read_from("training_args.py", f"{CLASS}    {line}\n")
    read, real = training_fields.training_fields(), fields_of(TrainingArguments)
    assert read != real
    assert read.type_of("num_train_epochs") == real.types["num_train_epochs"]
    assert read.default_of("num_train_epochs") == 3
    check_training_arguments({"num_train_epochs": 2.5})


@pytest.mark.parametrize(
    "member", ['make("steps")', 'STEPS: str = "steps"', "\n    if True:\n        STEPS = 'steps'", "1"]
)
def test_enumeration_that_is_read_in_part_is_that_of_the_class(
    member: str, read_from: Callable[[str, str], None]
) -> None:
    steps = member if "STEPS" in member else f"STEPS = {member}"
    read_from("trainer_utils.py", f'class IntervalStrategy(ExplicitEnum):\n    NO = "no"\n    {steps}\n')
    read_from("training_args.py", f'{CLASS}    eval_strategy: IntervalStrategy | str = "no"\n')
    read = training_fields.training_fields()
    assert "eval_strategy" not in read.types
    assert said(read.type_of("eval_strategy")) == said(fields_of(TrainingArguments).types["eval_strategy"])


def test_key_or_value_that_the_class_takes_is_not_refused_by_its_source(read_from: Callable[[str, str], None]) -> None:
    read_from("training_args.py", f"{CLASS}    num_train_epochs: str = None\n")
    check_training_arguments({"weight_decay": 0.1, "num_train_epochs": 3.0})
    with pytest.raises(ConfigError, match=r"training\.weight_decai is not an .*; did you mean weight_decay\?"):
        check_training_arguments({"weight_decai": 0.1})


@pytest.mark.parametrize("annotation", ["ClassVar[int]", "typing.ClassVar", "'ClassVar[int]'", "KW_ONLY"])
def test_annotations_that_make_no_field_make_no_argument(
    annotation: str, read_from: Callable[[str, str], None]
) -> None:
    read_from("training_args.py", f"{CLASS}    shared: {annotation} = 3\n")
    assert training_fields.training_fields().known == {"learning_rate"}
    with pytest.raises(ConfigError, match=r"training\.shared is not an argument of TrainingArguments"):
        check_training_arguments({"shared": 4})


@pytest.fixture
def read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a file of transformers that is read in place of the installed one; those not written are empty."""
    for name in training_fields._FILES:
        (tmp_path / name).touch()
    monkeypatch.setattr(training_fields.importlib.util, "find_spec", lambda _: SpecOf(tmp_path))
    training_fields.training_fields.cache_clear()

    def write(name: str, source: str) -> None:
        (tmp_path / name).write_text(source)

    yield write
    training_fields.training_fields.cache_clear()


@dataclasses.dataclass
class SpecOf:
    """A package in a folder."""

    folder: Path

    @property
    def submodule_search_locations(self) -> list[str]:
        return [str(self.folder)]
