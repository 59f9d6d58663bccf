"""Names, types and defaults of TrainingArguments, read from the source of the installed transformers.

Importing the class imports PEFT, which imports bitsandbytes, which imports torch's compiler: half as long again as
torch itself. A plan only needs to know what the arguments are called and may be. What cannot be read here, in this or
another release, is looked up in the class.
"""

import ast
import builtins
import dataclasses
import importlib.util
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
_CLASS = "TrainingArguments"


@dataclass(frozen=True)
class ArgumentFields:
    """The fields of a class of arguments.

    Attributes:
        name: of the class.
        known: names of the fields that its `__init__` takes.
        types: of the fields, as far as they are known without importing the class.
        defaults: of the fields that have a plain value, as far as they are known without importing the class.
    """

    name: str
    known: frozenset[str]
    types: dict[str, Any]
    defaults: dict[str, Any]

    def type_of(self, field: str) -> Any:
        """The type of a field, as `typing.get_type_hints` has it."""
        return self.types[field] if field in self.types else fields_of(_imported()).types[field]

    def default_of(self, field: str) -> Any:
        """The default of a field; `dataclasses.MISSING` where it is made anew each time."""
        return self.defaults[field] if field in self.defaults else fields_of(_imported()).defaults[field]


def fields_of(arguments: type[Any]) -> ArgumentFields:
    """The fields of a class of arguments that has been imported."""
    own = dataclasses.fields(arguments)
    return ArgumentFields(
        name=arguments.__name__,
        known=frozenset(each.name for each in own if each.init),
        types=typing.get_type_hints(arguments),
        defaults={each.name: each.default for each in own},
    )


@cache
def training_fields() -> ArgumentFields:
    """The fields of TrainingArguments; torch and PEFT are not imported where its source can be read."""
    return _read() or fields_of(_imported())


def _imported() -> type[Any]:
    from transformers import TrainingArguments

    return TrainingArguments


def _read() -> ArgumentFields | None:
    """None where transformers lies otherwise, or its class is no plain dataclass."""
    spec = importlib.util.find_spec("transformers")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    try:
        trees = [ast.parse((Path(folder) / name).read_bytes()) for folder in folders for name in _FILES]
    except (OSError, SyntaxError):
        return None
    classes = {each.name: each for tree in trees for each in tree.body if isinstance(each, ast.ClassDef)}
    found = classes.get(_CLASS)
    if found is None or found.bases:
        return None
    enums = {name: made for name, node in classes.items() if (made := _enum(node))}
    names = vars(builtins) | {"Any": typing.Any, "Literal": typing.Literal} | enums
    known, types, defaults = set(), {}, {}
    for name, annotation, value in _fields(found):
        known.add(name)
        # An annotation is an expression over names of types; one with other names is left to the class.
        used = {each.id for each in ast.walk(annotation) if isinstance(each, ast.Name)}
        if used <= names.keys() and not isinstance(annotation, ast.Constant):
            types[name] = eval(compile(ast.Expression(annotation), _FILES[0], "eval"), {"__builtins__": {}}, names)
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError:
            continue
    return ArgumentFields(_CLASS, frozenset(known), types, defaults) if known else None


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Name, type and default of each field; of a default that a function makes, an expression that is no literal."""
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None:
            value = each.value
            if isinstance(value, ast.Call):  # dataclasses.field
                given = {keyword.arg: keyword.value for keyword in value.keywords}
                if getattr(given.get("init"), "value", True) is False:
                    continue
                value = given.get("default", value)
            yield each.target.id, each.annotation, value


def _enum(node: ast.ClassDef) -> type[Enum] | None:
    """An enumeration of texts, by what its members are assigned; None for any other class."""
    if not any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
        return None
    members = {
        target.id: each.value.value
        for each in node.body
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
        for target in each.targets
        if isinstance(target, ast.Name)
    }
    return cast(type[Enum], Enum(node.name, members)) if members else None
