"""What sections of the run file are made of: their base class, and types of their values."""

import os
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from expertune.config.messages import wrong_key
from expertune.config.secrets import without_secrets
from expertune.errors import ConfigError

_MAX_PATH, _MAX_PATH_PART = 4096, 255  # of Linux, and no more than elsewhere

_UNITS = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1, "": 1}
_NOTHING = re.compile(rf"0(\.0*)?\s*({'|'.join(_UNITS)})")


class Section(BaseModel):
    """A part of the run file. Unknown keys are refused: a misspelled key must never read as its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_it_is_meant(cls, values: Any) -> Any:
        """A section without keys is an empty one; pydantic would read `r: yes` as 1."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, value in values.items():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else Any
            if value is None and _is_mapping(annotation):
                values[name] = {}
            inside = value.values() if isinstance(value, dict) else [value]
            if not _takes_bool(annotation) and any(isinstance(each, bool) for each in inside):
                raise wrong_key(name, "a number or text is wanted, not true or false (yes, no, on, off)")
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise ConfigError(
                f"{type(self).__name__}: {name} cannot be set, because a config stays as it was checked; make another "
                "with expertune.load_config(config, ['section.key=value'])"
            )
        super().__setattr__(name, value)

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """What was set, without secrets: as short as the run file."""
        set_here: dict[str, Any] = without_secrets(self.model_dump(exclude_unset=True))
        return set_here.items()


def _is_a_path(value: str) -> str:
    """No text that no file system could hold, and no empty one, which would mean the working directory."""
    if not value.strip():
        raise ValueError("an empty name; give one, or remove the key")
    if value.startswith("~") and os.path.expanduser(value) == value:  # noqa: PTH111 - Path's own raises
        raise ValueError("there is no such user, whose home this would name")
    if len(value) > _MAX_PATH or any(len(part.encode()) > _MAX_PATH_PART for part in value.split("/")):
        raise ValueError(f"a path or name that is too long ({len(value)} characters)")
    return value


def _as_text(value: Any) -> Any:
    """A Path of a Python program as a run file would have it."""
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_is_a_path)]


def _are_sources(value: Any) -> str | list[str]:
    value = [_as_text(each) for each in value] if isinstance(value, list) else _as_text(value)
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(each, str) for each in several):
        raise ValueError("wanted is a path, a glob, the name of a hub dataset, or a list of these")
    for each in several:
        _is_a_path(each)
    return value


Sources = Annotated[str | list[str], BeforeValidator(_are_sources)]


def _is_a_size(value: Any) -> str | int:
    try:
        size = parse_size(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value if isinstance(value, str | int) else size


# One check of the whole value: of a union pydantic would report each part, by names of its own.
Size = Annotated[str | int, BeforeValidator(_is_a_size)]


def _is_auto_or_a_size(value: Any) -> str | int:
    try:
        return "auto" if value == "auto" else _is_a_size(value)
    except ValueError:
        raise ValueError("write auto, or a size such as 4GB") from None


def _is_auto_zero_or_a_size(value: Any) -> str | int:
    try:
        return 0 if _NOTHING.fullmatch(str(value).strip().lower()) else _is_auto_or_a_size(value)
    except ValueError:
        raise ValueError("write auto, 0 or a size such as 4GB") from None


AutoOrSize = Annotated[str | int, BeforeValidator(_is_auto_or_a_size)]
AutoZeroOrSize = Annotated[str | int, BeforeValidator(_is_auto_zero_or_a_size)]


def parse_size(value: str | int) -> int:
    """Bytes in `24GB`, `16GiB`, `512MB` or a plain number. GB is 1e9 bytes, GiB is 2**30.

    Raises:
        ConfigError: the text is not a size, or a number of bytes that can only be one of gigabytes.
    """
    text = str(value).strip().lower()
    unit = next(unit for unit in _UNITS if text.endswith(unit))
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{value!r:.200} is not a size; write it as 24GB, 16GiB or a number of bytes")
    if not unit and size < 10**6:
        raise ConfigError(f"{text} without a unit means bytes; write {text}GB, or whichever unit is meant")
    return size


def _takes_bool(annotation: Any) -> bool:
    """Whether a field's type has a place for true and false."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return True  # which looks for itself
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Section))
