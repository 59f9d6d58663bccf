"""What a run reads beside its run file, by content: a resumed run must find it as it was, wherever it lies now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from expertune.checkpoint.adapter_folder import WEIGHTS_NAME
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.config import RunConfig
from expertune.data import TokenizedExamples
from expertune.data.token_cache import tokenizer_digest
from expertune.errors import CheckpointError, ConfigError, DataError, ExpertuneError
from expertune.run.record import RunRecord
from expertune.storage import hash_file


def identify(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, TokenizedExamples | None],
    start: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Hashes of all that decides what a run is trained on, as plain values.

    Args:
        config: the run.
        tokenizer: the base model's.
        rows: `train` and `eval`.
        start: what `adapter_digests` gives of the adapter to start from; None without one.
    """
    template = Path(config.data.template).expanduser() if config.data.template else None
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "template": _of_file(template),
        "init_from": start,
        "rows": {part: held.digest for part, held in rows.items() if held},
    }


def require_same_identity(
    record: RunRecord, config: RunConfig, base: Fingerprint, now: Mapping[str, Any], rows: Mapping[str, Any]
) -> None:
    """Refuse to resume over another base model, tokenizer, template, adapter to start from, or other rows.

    Args:
        record: of the run; of a fresh one there is nothing to compare.
        config: the run as it is asked for now.
        base: the fingerprint of the base model.
        now: what `identify` gives now.
        rows: reports of `train` and `eval`, whose files are named where they have changed.

    Raises:
        CheckpointError, ConfigError, DataError: names what has changed.
    """
    before, end = record.section("inputs"), "restore it, or start a new output_dir"
    if isinstance(before.get("init_from"), str):  # an earlier record, which has the weights' alone
        before = {**before, "init_from": (now["init_from"] or {}) | {WEIGHTS_NAME: before["init_from"]}}
    kept = Fingerprint.from_json(record.section("model").get("base"), f"{record.path}: model.base")
    if kept is not None and (found := kept.differences(base)):
        raise CheckpointError(
            f"resume: model {config.model} is not the one that the run started with: {'; '.join(found[:3])}; {end}"
        )
    named: dict[str, tuple[str, type[ExpertuneError]]] = {
        "tokenizer": (f"the tokenizer of {config.model}", CheckpointError),
        "template": (f"data.template: {config.data.template}", ConfigError),
        "init_from": (f"lora.init_from: {config.lora.init_from}", CheckpointError),
    }
    for key, (what, kind) in named.items():
        if key in before and before[key] != now[key]:
            raise kind(f"resume: {what} has changed since the run started; {end}")
    require_same_files(record, rows)
    for part, digest in before.get("rows", {}).items():
        if digest != now["rows"].get(part):
            raise DataError(
                f"resume: data.{part}: its rows are not read or encoded as they were when the run started (another "
                "slice, or another release of Expertune or of a library); restore that, or start a new output_dir"
            )


def require_same_files(record: RunRecord, reports: Mapping[str, Any]) -> None:
    """Refuse to resume over files of rows that have changed: their order and text decide every step."""
    for part, before in record.section("data").items():
        now = reports.get(part)
        if before and now and "sha256" in before and before["sha256"] != now["sha256"]:
            # A glob may find more files than it did, or fewer.
            names = [*now["sha256"], *(name for name in before["sha256"] if name not in now["sha256"])]
            changed = [name for name in names if before["sha256"].get(name) != now["sha256"].get(name)]
            new = [name for name in changed if name not in before["sha256"]]
            gone = [name for name in changed if name not in now["sha256"]]
            what = f" (new: {', '.join(new) or 'none'}; gone: {', '.join(gone) or 'none'})" if new or gone else ""
            raise DataError(
                f"resume: data.{part}: {', '.join(changed)} has changed since the run started{what}; restore it, or "
                "start a new output_dir"
            )


def _of_file(path: Path | None) -> str | None:
    """Of a file's content; None where there is no such file, as for a template that ships with the program."""
    try:
        return hash_file(path).sha256 if path else None
    except OSError:
        return None
