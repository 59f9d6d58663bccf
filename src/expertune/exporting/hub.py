"""An export on the Hugging Face hub, through its own client: one commit with all files.

What names a place on this machine is left out of the copy that is sent: an adapter's config has its base by path where
that was a folder, and a verification may have one in what an engine said.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from expertune.errors import ConfigError, ExportError, first_line

# Files with messages or names of models, in which a path may be anywhere; in other JSON a text that is one as a whole
# is cut down, for a template or a token, such as `</s>`, has to stay as it is. Vocabularies have none.
_CONFIGS = frozenset({"adapter_config.json", "config.json", "verification.json"})
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
_WHOLE_PATH = re.compile(r"(?:(?:\.{1,2}|~|[A-Za-z]:)[/\\]|[/\\][^\s/\\]+[/\\])[^\n]*")
_PATH = re.compile(r"(?<![\w.:/~])(?:\.{1,2}|~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":;,]+[/\\])*([^\s/\\'\":;,]+)")

_TOKENS = "https://huggingface.co/settings/tokens"
_Result = TypeVar("_Result")


def require_hub(name: str) -> None:
    """Ask the hub, before any work, who the user is.

    Raises:
        ConfigError: `name` is no name of a repository, there is no token, or the hub does not accept it.
        ExportError: the hub cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"push_to_hub: {name} is no name of a repository ({first_line(error)}); take OWNER/NAME"
        ) from None
    if not get_token():
        raise ConfigError(
            f"push_to_hub: no token of the hub is here; log in with `hf auth login`, or set HF_TOKEN ({_TOKENS})"
        )
    _asking(name, HfApi().whoami)


def push(folder: Path, name: str, private: bool | None) -> str:
    """Send a folder to the hub, into a repository that is made where there is none.

    Args:
        folder: what is sent.
        name: the repository.
        private: of one that is made; None means the owner's default.

    Returns:
        Its address.

    Raises:
        ExportError: the hub refuses it or cannot be reached; the folder is as it was.
    """
    api = HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), _public(path)) for path in files]

    def send() -> str:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(made.repo_id, operations, commit_message="Export by Expertune")
        return str(made)

    try:
        return _asking(name, send)
    except (ConfigError, ExportError) as error:
        by_hand = f"`hf upload {name} {folder}` sends it, with the paths that its JSON files have"
        raise ExportError(f"{error}. The export is whole in {folder}: {by_hand}") from None


def _asking(name: str, ask: Callable[[], _Result]) -> _Result:
    """What the hub answers; raises one error in words."""
    try:
        return ask()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise ConfigError(f"push_to_hub: the hub does not accept the token; take another one ({_TOKENS})") from None
        if status == 403:
            wanted = f"take one that has write access ({_TOKENS}), or a name of your own"
            raise ConfigError(f"push_to_hub: the token may not write to {name}; {wanted}") from None
        raise ExportError(f"push_to_hub: the hub refuses {name} ({_said(error)})") from None
    except OfflineModeIsEnabled:
        raise ConfigError("push_to_hub: HF_HUB_OFFLINE is set, and nothing may go online; unset it") from None
    except Exception as error:  # of the client's libraries for connections and files
        cause = error.__cause__ or error
        raise ExportError(f"push_to_hub: the hub was not reached, or broke off ({_said(cause)})") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _public(path: Path) -> Path | bytes:
    """A file as it is sent: itself, or its content without paths of this machine."""
    if path.suffix != ".json" or path.name in _VOCABULARIES or path.name.endswith(".index.json"):
        return path
    values = json.loads(path.read_text(encoding="utf-8"))
    public = _without_paths(values, anywhere=path.name in _CONFIGS)
    if public == values:
        return path
    return (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _without_paths(value: Any, anywhere: bool) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each, anywhere) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each, anywhere) for each in value]
    if not isinstance(value, str):
        return value
    if _is_folder(value) or (not anywhere and _WHOLE_PATH.fullmatch(value)):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return _PATH.sub(r"\1", value) if anywhere else value


def _is_folder(value: str) -> bool:
    """Whether a text is a path of something here: a relative one shows where somebody keeps it, too."""
    try:
        return ("/" in value or "\\" in value) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
