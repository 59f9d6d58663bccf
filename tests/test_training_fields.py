"""The fields of TrainingArguments as their source is read are those of the class."""

import dataclasses
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


@pytest.mark.parametrize("source", ["", "class TrainingArguments(Other):\n    seed: int = 1\n", "def broken(:\n"])
def test_source_of_another_form_gives_way_to_the_class(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in training_fields._FILES:
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(training_fields.importlib.util, "find_spec", lambda _: SpecOf(tmp_path))
    training_fields.training_fields.cache_clear()
    try:
        assert training_fields.training_fields() == fields_of(TrainingArguments)
        with pytest.raises(ConfigError, match=r"training\.learning_rate: has to be a valid number"):
            check_training_arguments({"learning_rate": "abc"})
    finally:
        training_fields.training_fields.cache_clear()


@dataclasses.dataclass
class SpecOf:
    """A package in a folder."""

    folder: Path

    @property
    def submodule_search_locations(self) -> list[str]:
        return [str(self.folder)]
