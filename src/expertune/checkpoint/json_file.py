"""JSON files of a model folder or an adapter, which may come from anywhere: read within bounds, refused by name."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from expertune.errors import CheckpointError, ConfigError, ExpertuneError
from expertune.storage import how_to_replace

# The index of the largest published model has 10 MB.
_MAX_BYTES = 256 * 2**20
_MAX_CONFIG_BYTES = 16 * 2**20

# A thousand times what models have, and little enough to build one without weights in seconds.
_LARGEST = (
    ("*layer*", 2_000),
    ("*experts*", 2**13),
    ("*heads*", 2**16),
    ("*_dim", 2**17),
    ("*rank*", 2**17),
    ("*vocab*", 2**30),
    ("*size*", 2**24),
    ("*", 2**53),
)


def read_mapping(
    path: Path,
    error: type[ExpertuneError] = CheckpointError,
    fix: str | None = None,
    max_bytes: int = _MAX_BYTES,
) -> dict[str, Any]:
    """The content of a JSON file that holds a mapping.

    Args:
        path: the file.
        error: what is raised.
        fix: the end of the message; None says how to have it again from where it came.
        max_bytes: a larger file is refused unread.

    Raises:
        ExpertuneError: no such file, or it is too large, no JSON, nested too deeply, or no mapping; names it.
    """
    fix = fix or how_to_replace(path)
    try:
        if not path.is_file():
            raise error(f"{path}: no such file; {fix}")
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path}: {size / 2**20:.0f} MiB are more than such a file has; {fix}")
        values = json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    except RecursionError:
        raise error(f"{path}: damaged: brackets are nested too deeply; {fix}") from None
    except ValueError as problem:
        raise error(f"{path}: damaged: not valid JSON ({problem}); {fix}") from None
    if not isinstance(values, dict):
        raise error(f"{path}: damaged: expected a mapping, got {type(values).__name__}; {fix}")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's `config.json`.

    Raises:
        ConfigError: there is none, it is damaged, or describes a model of a size that none has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.json here; is it a model folder?")
    values = read_mapping(path, ConfigError, max_bytes=_MAX_CONFIG_BYTES)
    if "model_type" in values and not isinstance(values["model_type"], str):
        raise ConfigError(f"{path}: model_type is {values['model_type']!r}, which is no name; {how_to_replace(path)}")
    _require_sane(path, values)
    return values


def _require_sane(path: Path, values: dict[str, Any], depth: int = 0) -> None:
    if depth > 20:
        raise ConfigError(f"{path}: damaged: sections are nested too deeply; {how_to_replace(path)}")
    for key, value in values.items():
        if isinstance(value, dict):
            _require_sane(path, value, depth + 1)
        elif isinstance(value, int):
            largest = next(limit for pattern, limit in _LARGEST if fnmatchcase(key, pattern))
            if abs(value) > largest:
                raise ConfigError(
                    f"{path}: {key} is {str(value)[:20]}, and no model has more than {largest}; correct it"
                )
