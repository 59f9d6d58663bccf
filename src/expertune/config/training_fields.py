"""Names, types and defaults of TrainingArguments, read from the source of the installed transformers.

Importing the class imports PEFT, which imports bitsandbytes, which imports torch's compiler: half as long again as
torch itself. A plan only needs to know what the arguments are called and may be. What cannot be read here, in this or
another release, is looked up in the class; and what the source says refuses nothing before the class has been asked.
"""

import ast
import builtins
import contextlib
import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
_CLASS = "TrainingArguments"

# Annotations that make no field of a name.
_NO_FIELD = re.compile(r"[\"']?(\w+\.)*(ClassVar|KW_ONLY)\b")


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
        return self.types[field] if field in self.types else imported_fields().types[field]

    def default_of(self, field: str) -> Any:
        """The default of a field; `dataclasses.MISSING` where it is made anew each time."""
        return self.defaults[field] if field in self.defaults else imported_fields().defaults[field]


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
    try:
        found = _read()
    except Exception:  # source of a form that is not foreseen here: the class says the same
        found = None
    return found or imported_fields()


@cache
def imported_fields() -> ArgumentFields:
    """The fields of TrainingArguments as the class has them."""
    from transformers import TrainingArguments

    return fields_of(TrainingArguments)


def _read() -> ArgumentFields | None:
    """None where transformers lies otherwise, or its class is no plain dataclass."""
    spec = importlib.util.find_spec("transformers")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    trees = [ast.parse((Path(folder) / name).read_bytes()) for folder in folders for name in _FILES]
    classes = {each.name: each for tree in trees for each in tree.body if isinstance(each, ast.ClassDef)}
    found = classes.get(_CLASS)
    if found is None or found.bases:
        return None
    enums = {name: made for name, node in classes.items() if (made := _enum(node))}
    names = vars(builtins) | {"Any": typing.Any, "Literal": typing.Literal} | enums
    bound_again = _bound_otherwise(found)
    known, types, defaults = set(), {}, {}
    for name, annotation, value in _fields(found):
        known.add(name)
        if name in bound_again:
            continue
        # An annotation is an expression over names of types; one with other names is left to the class.
        used = {each.id for each in ast.walk(annotation) if isinstance(each, ast.Name)}
        if used <= names.keys() and not _names_a_type_by_text(annotation):
            with contextlib.suppress(Exception):
                types[name] = eval(compile(ast.Expression(annotation), _FILES[0], "eval"), {"__builtins__": {}}, names)
        with contextlib.suppress(Exception):
            defaults[name] = ast.literal_eval(value)
    return ArgumentFields(_CLASS, frozenset(known), types, defaults) if known else None


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Name, type and default of each field; where there is none, or a function makes it, an expression without value.

    A field that `__init__` may not take is left out: the class knows.
    """
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if _NO_FIELD.match(ast.unparse(each.annotation)):
            continue
        value = each.value or each.target
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
            given = {keyword.arg: keyword.value for keyword in value.keywords}
            if None in given or getattr(given.get("init"), "value", "init" not in given) is not True:
                continue
            value = given.get("default", value)
        yield each.target.id, each.annotation, value


def _bound_otherwise(node: ast.ClassDef) -> set[str]:
    """Names in a class that more than annotated assignments give a value, by which a field's default is another."""
    others = [each for each in node.body if not isinstance(each, ast.AnnAssign)]
    functions = {
        each.name for each in others if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    inner = [part for each in others if getattr(each, "name", None) not in functions for part in ast.walk(each)]
    return functions | {part.id for part in inner if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def _names_a_type_by_text(annotation: ast.AST) -> bool:
    """Whether a text in an annotation is a type's name, which only the class can resolve; in Literal it is a value."""
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", None) == "Literal":
        return False
    if isinstance(annotation, ast.Constant):
        return isinstance(annotation.value, str)
    return any(map(_names_a_type_by_text, ast.iter_child_nodes(annotation)))


def _enum(node: ast.ClassDef) -> type[Enum] | None:
    """An enumeration of texts, by what its members are assigned; None for any other class, and where a part of it is
    not as plain: without all members it would refuse what the class takes.
    """
    if not any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
        return None
    members: dict[str, str] = {}
    for each in node.body:
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            continue  # its docstring
        if not isinstance(each, ast.Assign) or not isinstance(each.value, ast.Constant):
            return None
        if not isinstance(each.value.value, str) or not all(isinstance(target, ast.Name) for target in each.targets):
            return None
        members |= {cast(ast.Name, target).id: each.value.value for target in each.targets}
    return cast(type[Enum], Enum(node.name, members)) if members else None
