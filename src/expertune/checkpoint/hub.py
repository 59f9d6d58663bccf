"""Find a model: a local folder as it is, or a hub repository through the hub's own client."""

from dataclasses import dataclass
from pathlib import Path

from expertune.checkpoint.model_folder import require_model_folder
from expertune.errors import CheckpointError, ExpertuneError, first_line, option

CODE = ["*.py"]
SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
_WEIGHTS = ["*.safetensors"]

UNASKED_CODE = (
    "it comes with Python code of its own, which is not run unasked; read the code, and if you trust it give "
    + option("trust-remote-code")
)
"""Why a model or tokenizer is not loaded."""


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine and where it came from.

    Attributes:
        folder: local folder with config, tokenizer and weights.
        revision: the commit that a hub id resolved to; None for a local folder.
        trust_remote_code: whether Python that ships with the model may run.
    """

    folder: Path
    revision: str | None = None
    trust_remote_code: bool = False


def fetch_model(
    model: str, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> ModelSource:
    """A local folder, or the hub snapshot of `model`, downloaded or taken from the hub's cache.

    Args:
        model: path or hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: fetch Python that ships with the model, and let it run.
        weights: False fetches everything else: config, tokenizer, the index of the shards.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached, or a folder that holds no finished
            model; says what to do.
    """
    patterns = SMALL_FILES + (_WEIGHTS if weights else []) + (CODE if trust_remote_code else [])
    folder, on_hub = find_folder(model, revision, patterns)
    return ModelSource(folder, folder.name if on_hub else None, trust_remote_code)


def find_folder(
    model: str,
    revision: str | None,
    patterns: list[str],
    error: type[ExpertuneError] = CheckpointError,
    what: str = "it",
    note: str = "",
) -> tuple[Path, bool]:
    """A local folder as it is, or a hub repository's files of these patterns; and whether it is the hub's.

    Args:
        model: path or hub id.
        revision: branch, tag or commit of a hub id.
        patterns: which files are downloaded where they are not in the hub's cache.
        error: what is raised.
        what: what the hub did not give, for the message.
        note: what is said of a local copy in the message.

    Raises:
        ExpertuneError: neither a folder nor a repository that can be reached, or a folder that holds no finished model;
            says what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        require_model_folder(folder)
        return folder, False
    if folder.exists():
        raise error(f"model {model}: a file; give the folder that holds the model's files")
    if model.startswith((".", "/", "~")):
        raise error(f"model {model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns)), True
    except HFValidationError:
        raise error(f"model {model}: neither a folder here nor a hub id of the form owner/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as refused:
        raise error(
            f"model {model}: no folder of this name here, and the hub did not give {what} ({hub_reason(refused)}). "
            f"Give the path of a local copy{note}, or go online (and log in with `hf auth login` for a gated model)"
        ) from None


def hub_reason(error: Exception) -> str:
    """Why the hub gave nothing, for people; its client's own words where it is none of the usual reasons."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its owner grants access, and has not granted it to you"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or shows it to others only"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no connection to it"
        return f"{cause}, and its cache on this machine does not have it"
    return f"{type(error).__name__}: {first_line(error)}"


def fetch_headers(model: str, revision: str | None) -> tuple[dict[str, tuple[int, ...]], int] | None:
    """Shapes by name, and bytes in all, of a hub repository's tensors, by range requests for the headers alone.

    Returns:
        None without a connection.

    Raises:
        CheckpointError: the repository holds no safetensors, or a damaged header.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import (
        HTTPError,  # httpx's, and from huggingface_hub 2 on httpx2's
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        metadata = get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError:
        raise CheckpointError(
            f"model {model}: the repository holds no safetensors; pickles are never loaded, so convert it first"
        ) from None
    except SafetensorsParsingError as error:
        raise CheckpointError(f"model {model}: a safetensors header is damaged ({first_line(error)})") from None
    except (OSError, HTTPError):
        return None
    tensors = {key: tensor for shard in metadata.files_metadata.values() for key, tensor in shard.tensors.items()}
    nbytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values())
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}, nbytes


def refusal(error: Exception) -> str:
    """Why transformers does not load something, in a line; names the option where a model asks for trust."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if not isinstance(error, ValueError | OSError | ImportError) or not reason:
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
    if "couldn't connect" in reason or "internet connection" in text:  # the library's own words name no file
        reason = (
            "a file that it needs is not here, and the hub, which may have it, cannot be reached; copy all its files"
        )
    reason = reason if len(reason) <= 400 else f"{reason[:400]} ..."
    if "trust_remote_code" not in text:
        return reason
    return UNASKED_CODE
