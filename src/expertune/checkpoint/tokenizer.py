"""Load a model folder's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from expertune.checkpoint.hub import refusal
from expertune.errors import CheckpointError


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: the folder has none, or one that cannot be read or has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {refusal(error)}") from None
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: the tokenizer has no end-of-sequence token, so that answers would never end")
    return tokenizer
