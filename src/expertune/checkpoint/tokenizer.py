"""Load a model folder's tokenizer."""

import contextlib
import json
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import tokenization_auto

from expertune.checkpoint.context import read_config
from expertune.checkpoint.hub import UNASKED_CODE, refusal
from expertune.checkpoint.sentencepiece_model import converted, needs_conversion
from expertune.errors import CheckpointError

# Ordinary text in several scripts, and single letters: whatever a vocabulary is made for, it has a token for a part.
_ORDINARY_TEXT = "a b A B 0 1 The quick brown fox, na\u00efve \u041f\u0440\u0438\u0432\u0435\u0442 \u4e2d\u6587"


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: the folder has none, or one that cannot be read, is a class of its own and not trusted, has no
            vocabulary, has no end-of-sequence token, or has tokens that the model has no embedding for.
    """
    folder = Path(folder)
    try:
        with converted(folder) if needs_conversion(folder) else contextlib.nullcontext(folder) as readable:
            config = read_config(readable, trust_remote_code)
            if not trust_remote_code:
                _require_known_class(folder, getattr(config, "model_type", ""))
            tokenizer = AutoTokenizer.from_pretrained(readable, config=config, trust_remote_code=trust_remote_code)
        tokenizer.name_or_path = str(folder)
        ids = tokenizer.encode(_ORDINARY_TEXT, add_special_tokens=False)
    except CheckpointError:
        raise
    # What damaged files lead to is of no one kind: the Rust library raises bare exceptions, and panics as well, which
    # are not even exceptions.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {_reason(folder, error)}") from None
    # For some families transformers makes a tokenizer without a vocabulary where the folder has no files of one. All
    # that it can encode is special tokens, so that every example would be empty.
    if set(ids) <= set(tokenizer.all_special_ids):
        files = " or ".join(dict.fromkeys(["tokenizer.json", *tokenizer.vocab_files_names.values()]))
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be used: it has no token for ordinary text (its vocabulary is of size "
            f"{len(tokenizer.get_vocab())}), as where the tokenizer's files are missing. Put those of the same model "
            f"into the folder: {files}, and tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer has no end-of-sequence token, so that answers would never end")
    _require_embeddings(tokenizer, folder, config)
    return tokenizer


def _require_known_class(folder: Path, model_type: str) -> None:
    """Refuse a tokenizer that is a class of the folder's own: without it, transformers reads tokenizer.json by another.

    That is taken, as a model's code is where transformers has the model's type, if `tokenizer_class` names a class of
    transformers, or transformers says of the model's type that it does without the class. Read from 5.23.
    """
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        code, name = said.get("auto_map"), said.get("tokenizer_class")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # missing or damaged, of which transformers' error says more
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if not code or (isinstance(name, str) and hasattr(transformers, name.removesuffix("Fast"))):
        return
    if model_type in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()):
        return
    raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {UNASKED_CODE}")


def _reason(folder: Path, error: BaseException) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        try:
            if path.is_file():
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as broken:
            return f"{name} is not valid JSON ({broken}); copy it again"
    reason = refusal(error) if isinstance(error, Exception) and str(error).strip() else type(error).__name__
    return f"{reason[:300]} ({type(error).__name__})"


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, folder: Path, config: PretrainedConfig | None) -> None:
    """Each token needs an embedding; without one, training ends in an index error of the model."""
    vocab_size = getattr(config.get_text_config(), "vocab_size", None) if config else None
    vocabulary = tokenizer.get_vocab()
    beyond = {token_id: token for token, token_id in vocabulary.items() if vocab_size and token_id >= int(vocab_size)}
    if beyond:
        last = max(beyond)
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(beyond)} tokens that the model has no embedding for: {beyond[last]!r} "
            f"has the id {last}, but config.json says vocab_size {vocab_size}. Use the tokenizer that belongs to the "
            "model, or resize the model's embeddings (resize_token_embeddings) and save it first"
        )
