"""The folder of an adapter, before its tensors are read; nothing is imported for it."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from expertune.config import LoraSection
from expertune.errors import CheckpointError, ConfigError
from expertune.storage import hash_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# No loader takes it for an adapter: some read every file that ends in .safetensors.
LIVE_NAME = "adapter_live.tensors"

ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, LIVE_NAME)
"""The files that an adapter's factors are read from; the last is there where it has something to say."""

SETTINGS = ("r", "alpha", "rslora", "rank_pattern", "alpha_pattern")
"""What an adapter was trained with, as keys of the run file's `lora:` section."""

SETTINGS_KEY = "expertune.lora"
"""Where the metadata of an adapter's weights has these."""

_MOST_HEADER_BYTES = 100_000_000  # by the format of safetensors


def adapter_digests(folder: str | Path) -> dict[str, str]:
    """sha256 of each of `ADAPTER_FILES` that is there, by name.

    Raises:
        CheckpointError: the factors are not there.
    """
    paths = [Path(folder) / name for name in ADAPTER_FILES]
    found = {path.name: hash_file(path).sha256 for path in paths if path.is_file()}
    if WEIGHTS_NAME not in found:
        raise CheckpointError(f"{Path(folder) / WEIGHTS_NAME}: no such file; copy the adapter's folder again")
    return found


def require_beginning(lora: LoraSection) -> None:
    """Refuse a `lora.init_from` that cannot be started from as the run file says, where that shows at a glance.

    Args:
        lora: the run file's section.

    Raises:
        ConfigError: see `require_adapter_folder`; or a value beside it is not the adapter's.
        CheckpointError: see `require_adapter_folder`.
    """
    if lora.init_from is None:
        return
    require_adapter_folder(lora.init_from)
    settings = _settings(Path(lora.init_from) / WEIGHTS_NAME)
    if not isinstance(settings, dict) or not settings.keys() >= set(SETTINGS):
        settings = _settings_of_others(Path(lora.init_from) / CONFIG_NAME)
    for key in SETTINGS:
        if key in settings:
            require_same_setting(lora, key, settings[key])


def require_same_setting(lora: LoraSection, key: str, found: Any) -> None:
    """Refuse a value that the run file sets beside `init_from` and the adapter contradicts.

    Args:
        lora: the run file's section.
        key: of the section.
        found: what the adapter has.

    Raises:
        ConfigError: names both values.
    """
    if key in lora.model_fields_set and getattr(lora, key) != found:
        twice = key == "r" and found == 2 * lora.r
        doubled = " (twice that, as files of lora.init: pissa have)" if twice else ""
        own, held = _as_written(getattr(lora, key)), _as_written(found)
        raise ConfigError(
            f"lora.{key} is {own}, but the adapter at {lora.init_from} has {held}{doubled}; "
            f"remove the key to take the adapter's (on the command line: lora.{key}=null)"
        )


def _as_written(value: Any) -> str:
    """A value as a run file has it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _settings(path: Path) -> Any:
    """What the header of the weights' file notes; None where it says nothing or is damaged, which is told later."""
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(num_bytes)) if num_bytes <= _MOST_HEADER_BYTES else {}
        return json.loads(header["__metadata__"][SETTINGS_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _settings_of_others(path: Path) -> dict[str, Any]:
    """What the config says of an adapter that another program wrote, as far as no tensor has to be looked at for it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {"r": config["r"]} | ({} if config.get("use_rslora") else {"alpha": config["lora_alpha"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # damaged, which is told later
    return {key: value for key, value in found.items() if type(value) in (int, float)}


def require_adapter_folder(name: str, key: str = "lora.init_from") -> None:
    """Refuse what is no folder of an adapter.

    Args:
        name: what the run file or a program says.
        key: where it says so.

    Raises:
        ConfigError: there is no such folder, or it is that of a run, in which the adapter has a folder of its own.
        CheckpointError: it lacks a file of an adapter.
    """
    folder = Path(name)
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise ConfigError(
            f"{key}: {name}: {problem}; give the folder of an adapter, such as `adapter` or a checkpoint in a run "
            "directory"
        )
    missing = [each for each in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / each).is_file()]
    if not missing:
        return
    if (folder / "adapter" / CONFIG_NAME).is_file():
        raise ConfigError(f"{key}: {name}: a run directory; its adapter is {folder / 'adapter'}")
    if checkpoints := sorted(str(path.parent) for path in folder.glob(f"checkpoint-*/{CONFIG_NAME}")):
        raise ConfigError(
            f"{key}: {name}: a run directory without an adapter yet; give {' or '.join(checkpoints[-3:])}"
        )
    pickled = " (pickled adapters are never loaded)" if missing == [WEIGHTS_NAME] else ""
    raise CheckpointError(
        f"{key}: {name}: no {missing[0]} here{pickled}; is it an adapter folder? Give another, or copy the adapter "
        "again"
    )
