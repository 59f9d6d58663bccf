"""What a record holds, read without trust in it, and in the form that people read."""

import math
from collections.abc import Mapping
from typing import Any

from expertune.report.charts import is_number

Record = Mapping[str, Any]

# Phases of a run that the plan's time of it is of.
PLANNED_PHASES = ("training", "evaluation", "answers")


def at(record: Any, *keys: str) -> Any:
    """The value under keys that lead into each other; None where one of them is missing."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def begins_as_base(record: Any) -> bool:
    """Whether a run's adapter changed nothing before it was trained."""
    lora = section(record, "config", "lora")
    return not lora.get("init_from") and lora.get("init", "default") in ("default", "pissa")


def number(record: Any, *keys: str) -> float | None:
    """The same, where it is a finite number."""
    found = at(record, *keys)
    return found if is_number(found) else None


def section(record: Any, *keys: str) -> Mapping[str, Any]:
    """The same, where it is a mapping; else an empty one."""
    found = at(record, *keys)
    return found if isinstance(found, Mapping) else {}


def entries(record: Any, *keys: str) -> list[Any]:
    """The same, where it is a list; else an empty one."""
    found = at(record, *keys)
    return found if isinstance(found, list) else []


def size(num_bytes: float | None) -> str:
    """Bytes with a decimal unit."""
    if num_bytes is None:
        return "-"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:,.{0 if num_bytes >= 100 * factor else 2}f} {unit}"
    return f"{num_bytes:.0f} B"


def selected_experts(selection: Mapping[str, Any]) -> tuple[str, str]:
    """How many experts of all have an adapter, and how much of the load they carry."""
    counts = section(selection, "experts")
    loads = [each for each in section(selection, "load").values() if is_number(each)]
    chosen = sum(len(entries(selection, "layers", name)) for name in counts)
    total = sum(each for each in counts.values() if is_number(each))
    load = 100 * sum(loads) / max(len(loads), 1)
    said = f"have an adapter, and get {load:.0f} % of the tokens; by {selection.get('select')}"
    return f"{chosen} of {total:.0f}", said


def duration(seconds: float | None) -> str:
    """A time in its two largest units."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if (whole := round(seconds)) < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return "-" if value is None else f"{value:,.0f}"


def figure(value: Any) -> str:
    """A score or a loss; what is not finite is kept in a record as text."""
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.4f}"


def percent(part: float | None, whole: float | None) -> str:
    """A part of a whole in percent; a dash where one is unknown."""
    if part is None or not whole or not math.isfinite(part / whole):
        return "-"
    return f"{100 * part / whole:.0f} %"


def setting(value: Any) -> str:
    """A value of the run file on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(setting(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted keys."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return found
