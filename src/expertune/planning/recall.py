"""A model's shapes and its examples' lengths as a plan has kept them: with both at hand it imports no torch."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from expertune.config import RunConfig
from expertune.data.sources import find_source
from expertune.errors import ExpertuneError
from expertune.kernels.amounts import Dtype
from expertune.planning.duration import Lengths
from expertune.planning.kept_files import kept, libraries, of_folder
from expertune.planning.shapes import Shapes, find_config
from expertune.storage import hash_file

# What builds a model on the meta device, and what makes tokens of examples.
_OF_SHAPES = ("transformers", "torch", "accelerate", "bitsandbytes")
_OF_LENGTHS = ("transformers", "tokenizers", "jinja2")
_MAYBE_OF_LENGTHS = ("sentencepiece", "tiktoken", "protobuf", "pyarrow", "numpy")

# Files of a model's folder that a tokenizer may be read from, and the folder of further templates beside them.
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe")
_MORE_TEMPLATES = "additional_chat_templates"

_COMMIT = re.compile(r"[0-9a-f]{40}")


def may_recall(trust_remote_code: bool) -> bool:
    """Whether what begins now may keep what it reads of models, and take what others have kept.

    Not of models with Python code of their own, and not where transformers is imported already: a program may have told
    it of other models. To be asked, therefore, before anything here imports it.
    """
    return not trust_remote_code and "transformers" not in sys.modules


def recall_shapes(config: RunConfig, compute_dtype: Dtype, trust_remote_code: bool = False) -> Shapes:
    """Read a run's model, or take what a plan of it has kept; arguments and errors as for `plan_for`.

    Of a run that starts from an adapter nothing is kept.
    """

    @cache
    def read() -> Shapes:
        from expertune.planning.reading import read_shapes  # which imports torch and transformers' models

        return read_shapes(config, compute_dtype, trust_remote_code)

    if config.lora.init_from:
        return read()
    folder, on_hub = find_config(config.model, config.revision)

    def decides() -> dict[str, Any] | None:
        return _known(_OF_SHAPES, lambda: _of_model(config, compute_dtype, folder, on_hub))

    # With a connection there may be more of a hub's model to look at.
    found = kept("shapes", decides, read, _form(Shapes), lambda shapes: not on_hub or shapes.source.saw_headers)

    @cache
    def count() -> int:
        return kept("cached", decides, lambda: read().inventory.cached_numbers, _form(int))

    return replace(found, inventory=replace(found.inventory, count_cached=count))


def _of_model(config: RunConfig, compute_dtype: Dtype, folder: Path, on_hub: bool) -> dict[str, Any] | None:
    """What decides a model's shapes; of a hub's model its commit, which never changes, stands for the headers."""
    if on_hub and not (folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)):
        return None
    return {
        "model": [config.model, folder.name] if on_hub else None,
        "folder": of_folder(folder, (".json",)),
        "quantization": config.quantization.model_dump(mode="json"),
        "said": sorted(config.quantization.model_fields_set),
        "init": [config.lora.init, config.lora.corrects],
        "dtype": compute_dtype.name,
    }


def recall_lengths(config: RunConfig, trust_remote_code: bool = False) -> Lengths:
    """What `planning.tokenized.tokenized_lengths` finds, or what a plan with the same examples has kept of it.

    Arguments and errors are that one's own.
    """

    def read() -> Lengths:
        from expertune.planning.tokenized import tokenized_lengths  # which imports transformers' tokenizers

        return tokenized_lengths(config, trust_remote_code)

    return kept("lengths", lambda: _known(_OF_LENGTHS, lambda: _of_examples(config)), read, _form(Lengths))


def _of_examples(config: RunConfig) -> dict[str, Any]:
    """What decides the lengths of a run's examples."""
    data, folder = config.data, Path(config.model).expanduser()
    template = Path(data.template).expanduser() if data.template else None
    further = folder / _MORE_TEMPLATES
    return {
        "folder": of_folder(folder, _TOKENIZER_FILES),
        "templates": of_folder(further, (".jinja",)) if further.is_dir() else None,
        "template": hash_file(template).sha256 if template and template.is_file() else None,
        "sources": [find_source(spec).content for spec in (data.train, data.eval) if spec is not None],
        "data": data.model_dump(mode="json"),
        "said": sorted(data.model_fields_set),
        "objective": config.objective,
        "further": [[name, _version(name)] for name in _MAYBE_OF_LENGTHS],
        "day": date.today().isoformat(),  # which templates may print
    }


def _known(names: tuple[str, ...], decides: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What decides something, together with the libraries that read it; None where any of it is not known."""
    releases = _releases(names)
    with suppress(OSError, RuntimeError, ValueError, ExpertuneError):  # who reads it says what is wrong
        if releases is not None and (found := decides()) is not None:
            return {"libraries": releases, **found}
    return None


@cache
def _releases(names: tuple[str, ...]) -> list[list[str]] | None:
    return libraries(*names)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _form(of: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(of)
