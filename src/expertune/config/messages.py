"""What pydantic finds wrong with a run file, in words: each key, what was found there, and what is meant."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from expertune.config.yaml_file import shortened
from expertune.errors import did_you_mean, nearest

# So many wrong keys are named at once.
_MAX_PROBLEMS = 20

# What PEFT and transformers call a thing that spelling does not lead to, or leads to another.
_OTHER_NAMES = {"rank": "r", "lora_rank": "r", "lora_r": "r", "max_seq_len": "max_length", "dataset": "train"}


def nearest_key(name: str, known: Iterable[str]) -> str:
    """What a message says of an unknown key: the one that is meant, or all that are known."""
    known = set(known)
    other = _OTHER_NAMES.get(name)
    return f"; did you mean {other}?" if other in known else did_you_mean(name, known, cutoff=0.5)


def unknown_name(message: str, known: Iterable[str]) -> PydanticCustomError:
    """A value that is none of some names, as a validator raises it."""
    return PydanticCustomError("unknown_name", message, {"known": list(known)})


def describe(error: ValidationError, where: str, kind: type[Any]) -> str:
    """A line for each problem.

    Args:
        error: of a section or of the whole run file.
        where: what each line starts with.
        kind: the class that was validated.
    """
    lines = []
    problems = error.errors()
    for problem in problems[:_MAX_PROBLEMS]:
        key, value = shortened(".".join(str(part) for part in problem["loc"])) or "the run file", problem["input"]
        if problem["type"] == "extra_forbidden":
            known = _known_keys(kind, problem["loc"][:-1])
            lines.append(f"{where}: unknown key {key}{nearest_key(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing; add it")
        else:
            message = shortened(problem["msg"].removeprefix("Value error, "), 500)
            found = f", got {shortened(repr(value))}" if not isinstance(value, dict) else ""
            lines.append(
                f"{where}: {key}: {message}{found}{_hint(problem)}" if problem["loc"] else f"{where}: {message}"
            )
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"{where}: and {len(problems) - _MAX_PROBLEMS} more")
    return "\n".join(lines)


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
        kind = field.annotation if field else None
    return set(getattr(kind, "model_fields", ()))
