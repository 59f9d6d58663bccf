"""What lies beside a run's adapter for those who are given it: a model card, and a tokenizer where they need one."""

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from expertune.adapt.files import read_adapter_config
from expertune.config import RunConfig
from expertune.data.template import chat_template_to_share
from expertune.errors import CheckpointError
from expertune.report.card import CARD_NAME, MARK, Subject, render_card
from expertune.storage import SCRATCH, write_text


def card_subject(record: Mapping[str, Any], config: RunConfig, folder: Path, **facts: Any) -> Subject:
    """What the card of an adapter is about; `facts` are further attributes of `Subject`.

    Raises:
        CheckpointError: the adapter's config cannot be read.
    """
    adapter = read_adapter_config(folder)
    base, revision = adapter.get("base_model_name_or_path") or config.model, adapter.get("revision")
    return Subject(record, config, str(base), revision, adapter=folder.name, **facts)


def card_text(subject: Subject) -> str:
    """The card.

    Raises:
        CheckpointError: the record, which may have come with a received run, is not as a run wrote it.
    """
    try:
        return render_card(subject)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"record.json: damaged where the model card takes its figures from ({error})") from error


def write_card(
    record: Mapping[str, Any], config: RunConfig, adapter: Path, export: Path | None = None, **facts: Any
) -> None:
    """Write the card of an adapter beside it, or into an export of it, unless a user has made the one there his own."""
    path = (export or adapter) / CARD_NAME
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, card_text(card_subject(record, config, adapter, **facts)))


def write_tokenizer(template: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base's tokenizer with the run's chat template beside the adapter, where the base has another or none.

    Args:
        template: the template that the run used.
        tokenizer: the base's; it stays as it is.
        folder: the adapter's.
    """
    text = chat_template_to_share(template, tokenizer)
    if text is not None:
        own = copy.deepcopy(tokenizer)
        own.chat_template = text
        with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            own.save_pretrained(scratch)
            for path in Path(scratch).iterdir():
                path.replace(folder / path.name)  # a link that lies there is not written through
