"""YAML as run files use it: plain values, each key once, within bounds that no run file comes near.

PyYAML's safe loader builds no objects, but it drops the first of two equal keys, ends in errors of many types, and
takes a few lines of aliases for gigabytes. Here every file either gives plain values or one ConfigError.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from expertune.errors import ConfigError

_MAX_BYTES = 256 * 1024
_MAX_VALUES = 20_000
_MAX_DEPTH = 40
_MAX_MERGED = 16
_MAX_INTEGER = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also reads 1e-4 as the number that everybody means (as YAML 1.2 does).

    A key that is there twice is refused: YAML would drop the first, and with it a whole section.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, each key once."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    where = f"line {key.start_mark.line + 1}"
                    raise yaml.YAMLError(f"{where}: {shortened(key.value)} is there twice; put the two together")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; what it cannot be (`!!int many`, `0x`) is an error of YAML's own type."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: not a value of type {kind} ({error})") from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge `<<` keys; a merge of merges may not grow without bounds."""
        for key, value in node.value:
            if key.value == "<<" and isinstance(value, yaml.SequenceNode) and len(value.value) > _MAX_MERGED:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: more than {_MAX_MERGED} mappings merged at once")
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: more than {_MAX_VALUES} keys after merging")


# YAML 1.1 also reads 010 as 8, 1:30 as 90 and a date as a point in time; here these are text, as they stand.
_AMBIGUOUS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _AMBIGUOUS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"),
    (
        "float",
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list("-+.0123456789"))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, of plain values.

    Raises:
        ConfigError: the file is missing, too large, not text, not YAML, or holds anything else than a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES // 1024} KiB; a run file is a short mapping of keys")
    values = parse_value(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: the file is empty; a run file is a mapping of keys (model, data, ...)")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of keys (model, data, ...), got {type(values).__name__}")
    return values


def parse_value(text: str, where: str) -> Any:
    """A YAML document as plain values: text, numbers, true, false, null, lists, and mappings with text for keys.

    Args:
        text: the document.
        where: what is named in errors.

    Raises:
        ConfigError: it is none, or is nested or grown by aliases beyond bounds.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
        _require_plain(values, where)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None
    return values


def shortened(value: Any, length: int = 200) -> str:
    """A value in an error: as it is written in Python, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _require_plain(values: Any, where: str) -> None:
    """Refuse what JSON could not hold, and what aliases blow up; every alias counts as often as it is used."""
    left = _MAX_VALUES
    stack: list[tuple[str, Any, int]] = [("", values, 0)]
    while stack:
        at, value, depth = stack.pop()
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            much = f"more than {_MAX_VALUES} values" if left < 0 else f"deeper than {_MAX_DEPTH} levels"
            raise ConfigError(f"{where}: {much}, aliases counted as often as they are used; a run file is short")
        problem = _problem_of(value)
        if problem:
            raise ConfigError(f"{where}: {shortened(at) or 'the value'}: {problem}")
        if isinstance(value, dict):
            for key, item in value.items():
                name = f"{at}.{key}" if at else str(key)
                if not isinstance(key, str):
                    raise ConfigError(f"{where}: {shortened(name)}: a key must be text, got {shortened(key)}")
                if problem := _problem_of(key):
                    raise ConfigError(f"{where}: key {shortened(name)!r}: {problem}")
                if item is None and ":" in key:  # as in {r:8}, which YAML reads as a key without a value
                    meant = shortened(key.replace(":", ": ", 1))
                    raise ConfigError(
                        f"{where}: {shortened(name)}: a colon needs a space behind it; write {shortened(meant)!r}"
                    )
                stack.append((name, item, depth + 1))
        elif isinstance(value, list):
            stack.extend((f"{at}[{index}]", item, depth + 1) for index, item in enumerate(value))


def _problem_of(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "holds a null character, which no path or name can have"
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds half of a character (a lone surrogate)"
        return None
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return "a number of more than 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if value is None or isinstance(value, bool | int | float | dict | list):
        return None
    return f"a value of type {type(value).__name__}; write it as text, in quotes"


def _one_line(error: yaml.YAMLError) -> str:
    """YAML's own words and place, without the excerpt of the file, which may be a line of any length."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return shortened(" ".join(str(error).split()), 400)
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return shortened(f"line {mark.line + 1}, column {mark.column + 1}: {', '.join(parts)}", 400)
