"""From text to token ids, so that generation starts from the very ids that training saw.

A row is tokenized as a whole where the prompt's ids are a prefix of the row's. Where a token would straddle the
boundary, the completion is tokenized as a continuation instead. Either way `encode_prompt(prompt)` is a prefix.
"""

from dataclasses import dataclass
from typing import Any

from expertune.data.row_template import Rendered
from expertune.data.rows import IGNORE_INDEX
from expertune.errors import ConfigError

# Tokenizers of the SentencePiece kind put a space in front of whatever text they are given. Behind a line break, which
# they never join with what follows, a continuation gets the ids it has in the middle of a text.
_ANCHOR = "\n"


@dataclass(frozen=True)
class _Piece:
    """Ids of a text and the character at which each starts."""

    ids: list[int]
    starts: list[int]

    def after(self, count: int) -> "_Piece":
        return _Piece(self.ids[count:], self.starts[count:])

    def shifted(self, by: int) -> "_Piece":
        return _Piece(self.ids, [start + by for start in self.starts])


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse tokenizers that rows cannot be made with.

    Raises:
        ConfigError: the tokenizer is not backed by a tokenizer.json, or it has no EOS token.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in the text; "
            "the model folder needs a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so no answer could end; set eos_token in its config")


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Ids that generation starts from: BOS (or what the tokenizer puts first) once, then the prompt, no EOS.

    Args:
        prompt: `TokenizedRow.prompt`, or what `render_prompt` returns.
        tokenizer: a fast transformers tokenizer.

    Returns:
        Token ids; for a row's prompt they are a prefix of the row's `input_ids`.
    """
    ids = _tokenize(prompt, tokenizer).ids
    return _lead(ids, tokenizer) + ids


def encode_row(rendered: Rendered, train_on: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a rendered row, before any cut.

    Args:
        rendered: the row as text.
        train_on: `DataConfig.train_on`.
        tokenizer: a fast transformers tokenizer.

    Returns:
        (input_ids, labels), equally long; EOS once at the end where the text does not hold it, and always trained.
    """
    piece = _tokenize_in_two(rendered.text, rendered.spans[-1][0], tokenizer)
    lead = _lead(piece.ids, tokenizer)
    labels = [IGNORE_INDEX] * len(lead)
    for token_id, begin in zip(piece.ids, piece.starts, strict=True):
        trained = train_on == "all" or any(start <= begin < end for start, end in rendered.spans)
        excluded = any(start <= begin < end for start, end in rendered.untrained)
        labels.append(token_id if trained and not excluded else IGNORE_INDEX)
    input_ids = lead + piece.ids
    if train_on == "all":
        labels[: len(lead)] = lead
    # Nothing stands before the first token that it could be predicted from.
    labels[:1] = [IGNORE_INDEX] * len(labels[:1])
    if rendered.append_eos:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return input_ids, labels


def _tokenize(text: str, tokenizer: Any) -> _Piece:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Some byte-level tokenizers trim spaces off their offsets, which leaves a token of spaces only with an empty range
    # behind itself.
    starts = [start if start < end else max(start - 1, 0) for start, end in encoded["offset_mapping"]]
    return _Piece(list(encoded["input_ids"]), starts)


def _tokenize_in_two(text: str, boundary: int, tokenizer: Any) -> _Piece:
    prompt = _tokenize(text[:boundary], tokenizer)
    whole = _tokenize(text, tokenizer)
    count = len(prompt.ids)
    if whole.ids[:count] == prompt.ids:
        completion = whole.after(count)
    else:
        completion = _tokenize_continuation(text[boundary:], tokenizer).shifted(boundary)
    # A token of the completion starts in it, whatever its offsets say about the space before its first letter.
    starts = [max(start, boundary) for start in completion.starts]
    return _Piece(prompt.ids + completion.ids, prompt.starts + starts)


def _tokenize_continuation(text: str, tokenizer: Any) -> _Piece:
    anchor = _tokenize(_ANCHOR, tokenizer)
    anchored = _tokenize(_ANCHOR + text, tokenizer)
    count = len(anchor.ids)
    if anchored.ids[:count] == anchor.ids:
        return anchored.after(count).shifted(-len(_ANCHOR))
    return _tokenize(text, tokenizer)


def _lead(ids: list[int], tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text (BOS, mostly), unless the text already starts with it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    count = next((index for index in range(len(full)) if full[index : index + len(plain)] == plain), 0)
    lead = list(full[:count])
    return [] if ids[:count] == lead else lead
