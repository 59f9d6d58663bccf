"""The folder of an adapter, before anything of it is read."""

from pathlib import Path

from expertune.errors import CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def require_adapter_folder(name: str) -> None:
    """Refuse a `lora.init_from` that is no folder of an adapter.

    Args:
        name: what the run file says.

    Raises:
        ConfigError: there is no such folder, or it is that of a run, in which the adapter has a folder of its own.
        CheckpointError: it lacks a file of an adapter.
    """
    folder = Path(name)
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise ConfigError(
            f"lora.init_from: {name}: {problem}; give the folder of an adapter, such as `adapter` or a checkpoint in "
            "a run directory"
        )
    missing = [each for each in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / each).is_file()]
    if not missing:
        return
    if (folder / "adapter" / CONFIG_NAME).is_file():
        raise ConfigError(f"lora.init_from: {name}: a run directory; its adapter is {folder / 'adapter'}")
    pickled = " (pickled adapters are never loaded)" if missing == [WEIGHTS_NAME] else ""
    raise CheckpointError(
        f"lora.init_from: {name}: no {missing[0]} here{pickled}; is it an adapter folder? Give another, or copy the "
        "adapter again"
    )
