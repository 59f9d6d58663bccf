"""A model as far as a plan reads it, as plain values: they can be kept, and a plan of them imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from expertune.checkpoint.hub import CODE, find_folder
from expertune.checkpoint.model_folder import INDEX_NAME
from expertune.checkpoint.targets import ResolvedTargets
from expertune.config import LoraSection
from expertune.errors import ConfigError
from expertune.planning.inventory import Inventory


@dataclass(frozen=True)
class Source:
    """A checkpoint as far as its headers tell.

    Attributes:
        holds_nf4: it is a folder that `expertune quantize` wrote.
        nbytes: bytes of its tensors; None where nothing says.
        saw_headers: whether the headers of its shards were looked at; else its index or its config is all that was.
        notes: what could not be looked at.
    """

    holds_nf4: bool = False
    nbytes: int | None = None
    saw_headers: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """A model as far as a plan reads it.

    Attributes:
        source: what its checkpoint says.
        inventory: its shapes.
        begun: for a run that starts from an adapter, its `lora` section in that one's own shape, and what that one is
            on; None for any other.
    """

    source: Source
    inventory: Inventory
    begun: tuple[LoraSection, ResolvedTargets] | None = None


def find_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Path, bool]:
    """Folder with the model's config.json, and whether it is a hub model's.

    Raises:
        ConfigError: there is no such folder, it has no config.json, or the hub did not give it; says what to do.
    """
    patterns = ["config.json", INDEX_NAME, *(CODE if trust_remote_code else [])]
    note = " (config.json alone is enough to plan)"
    folder, on_hub = find_folder(model, revision, patterns, ConfigError, "its config.json", note)
    if (folder / "config.json").is_file():
        return folder, on_hub
    if on_hub:
        raise ConfigError(f"model {model}: the repository has no config.json; is it a transformers model?")
    raise ConfigError(f"{folder / 'config.json'}: no such file; is {model} a model folder?")
