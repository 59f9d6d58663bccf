"""What pydantic finds wrong with a run file, in words: each key, what was found there, and what is meant."""

import json
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from expertune.config.origin import Origin
from expertune.config.training_fields import training_fields
from expertune.config.yaml_file import shortened
from expertune.errors import did_you_mean, nearest

# So many wrong keys are named at once.
_MAX_PROBLEMS = 20

# What a value has to be, by how pydantic's name of the problem begins.
_KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "dict": "a mapping",
    "model": "a section with keys of its own",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "path": "a path",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}

# Problems that a validator of ours has found, and whose message is its own.
_OURS = ("value_error", "unknown_name", "wrong_key")

# What PEFT and transformers call a thing that spelling does not lead to, or leads to another.
_OTHER_NAMES = {"rank": "r", "lora_rank": "r", "lora_r": "r", "max_seq_len": "max_length", "dataset": "train"}


def nearest_key(name: str, known: Iterable[str], run_file: type[Any] | None = None) -> str:
    """What a message says of an unknown key: the one that is meant, or all that are known.

    Args:
        name: the key, without its section.
        known: keys of the section.
        run_file: the class of a run file, where the key may stand in another section than its own.
    """
    known = set(known)
    other = _OTHER_NAMES.get(name, name)
    if other in known:
        return f"; did you mean {other}?"
    elsewhere = _keys_called(other, run_file) if run_file else []
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, known, cutoff=0.5)


def _keys_called(name: str, run_file: type[Any]) -> list[str]:
    """Keys of a run file that have a name, in whichever section they are."""
    fields: dict[str, Any] = getattr(run_file, "model_fields", {})
    sections = {key: _section_in(field.annotation) for key, field in fields.items() if not _is_list(field.annotation)}
    found = [name] if name in fields else []
    found += [f"{key}.{name}" for key, section in sections.items() if name in getattr(section, "model_fields", ())]
    if not found and "training" in fields and name in training_fields().known:
        found = [f"training.{name}"]
    return found


def unknown_name(message: str, known: Iterable[str]) -> PydanticCustomError:
    """A value that is none of some names, as a validator raises it."""
    return PydanticCustomError("unknown_name", message, {"known": list(known)})


def wrong_key(key: str, message: str) -> PydanticCustomError:
    """A wrong value of one key of a section, as a validator of the whole section raises it."""
    return PydanticCustomError("wrong_key", "{message}", {"key": key, "message": message})


def what_is_wrong(problem: Any) -> str:
    """What is wrong with a value, of a problem that pydantic has found; the arguments are those of `wanted`."""
    kind, message = problem["type"], str(problem["msg"])
    if kind in _OURS:
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return "unknown key"
    return "missing" if kind == "missing" else f"has to be {wanted(problem)}"


def wanted(problem: Any) -> str:
    """What a value has to be.

    Args:
        problem: one of `ValidationError.errors()`.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        bound = context[name]
        return f"{word} {int(bound) if bound == int(bound) else bound:,}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "too_short":
        return "a list that is not empty" if context["min_length"] == 1 else f"at least {context['min_length']} long"
    meant = next((words for start, words in _KINDS.items() if kind.startswith(start)), None)
    return meant or str(problem["msg"]).removeprefix("Input should be ")


def describe(error: ValidationError, origin: Origin, kind: type[Any]) -> str:
    """A line for each problem.

    Args:
        error: of a section or of the whole run file.
        origin: what each line starts with.
        kind: the class that was validated.
    """
    lines = []
    problems = error.errors()
    for problem in problems[:_MAX_PROBLEMS]:
        location = (*problem["loc"], *([problem["ctx"]["key"]] if problem["type"] == "wrong_key" else []))
        dotted, value = ".".join(map(str, location)), problem["input"]
        message, is_unknown = shortened(what_is_wrong(problem), 500), problem["type"] == "extra_forbidden"
        key, where = shortened(dotted) or "the run file", origin.of(dotted, "" if is_unknown else message)
        if is_unknown:
            known = _known_keys(kind, problem["loc"][:-1])
            lines.append(f"{where}: unknown key {key}{nearest_key(str(problem['loc'][-1]), known, kind)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing; add it")
        else:
            told = isinstance(value, dict) or message.startswith((as_written(value), f"{value} "))
            found = "" if told else f", got {shortened(as_written(value))}"
            lines.append(f"{where}: {key}: {message}{found}{_hint(problem)}" if location else f"{where}: {message}")
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"{origin.name}: and {len(problems) - _MAX_PROBLEMS} more")
    return "\n".join(lines)


def as_written(value: Any) -> str:
    """A value as a message has it: of true, false and null the run file's words."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _hint(problem: Any) -> str:
    """The name that is meant by a value, where the problem is an unknown one."""
    value, names = problem["input"], problem.get("ctx", {})
    if problem["type"] == "unknown_name":
        return did_you_mean(value, names["known"])
    if problem["type"] == "literal_error" and isinstance(value, str):
        meant = nearest(value, re.findall(r"'([^']+)'", names["expected"]))
        return f"; did you mean {meant}?" if meant else ""
    return ""


def _known_keys(kind: Any, location: Iterable[str | int]) -> set[str]:
    for part in location:
        field = getattr(kind, "model_fields", {}).get(str(part))
        # A number is a place in a list, of whose sections the last annotation spoke.
        kind = _section_in(field.annotation) if field else kind if isinstance(part, int) else None
    return set(getattr(kind, "model_fields", ()))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple)


def _section_in(annotation: Any) -> Any:
    """The section that a field's type has a place for; None where it has none."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
