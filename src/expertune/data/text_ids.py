"""From text to ids, each with the characters that it lies between.

Special tokens that the data spells out (`RenderedText.plain`) are tokenized as the text that they are there.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer

from expertune.data.column_template import Rendered
from expertune.data.lint import ExampleError, half_character
from expertune.data.special_tokens import plain_places, special_contents, special_pattern

# Tokenizers of the SentencePiece kind put a space in front of whatever text they are given. Behind a line break, which
# they never join with what follows, a continuation gets the ids it has in the middle of a text.
ANCHOR = "\n"

_WITH_OFFSETS = {
    "add_special_tokens": False,
    "return_offsets_mapping": True,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}

# The first of the private characters (the last block of Unicode's plane 16) that special tokens are renamed to.
_FIRST_NAME = 0x10E000


@dataclass(frozen=True)
class Piece:
    """Ids of a text and the characters between which each lies."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def after(self, count: int) -> "Piece":
        """Without its first ids."""
        return Piece(self.ids[count:], self.starts[count:], self.ends[count:])

    def placed(self, at: int) -> "Piece":
        """The piece of a text that starts at this character of the whole."""
        # A token starts in its own text, whatever its offsets say about the space before its first letter.
        if not at and min(self.starts, default=0) >= 0:
            return self
        return Piece(self.ids, [max(start, 0) + at for start in self.starts], [end + at for end in self.ends])

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)


class TokenizesAhead:
    """A tokenizer that tokenizes the texts of many examples in one call, on all cores, before they are asked for.

    Args:
        tokenizer: a fast transformers tokenizer; whatever is not known yet is left to it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, dict[str, Any]] = {}

    def take(self, examples: Sequence[Rendered]) -> None:
        """Tokenize the examples that are encoded next, in place of those before."""
        texts = [str(text) for each in examples for text in (each.text, each.text[: each.spans[-1][0]])]
        # A text that is no Unicode is refused when its example is encoded; here it would end the call for all.
        texts = [text for text in texts if half_character(text) is None]
        self._known = {}
        encoded = self._tokenizer(texts, **_WITH_OFFSETS) if texts else {}
        for name, values in encoded.items():
            for text, value in zip(texts, values, strict=True):
                self._known.setdefault(text, {})[name] = value

    def __call__(self, text: str, **options: Any) -> Any:
        """As transformers' tokenizers."""
        known = self._known.get(text) if options == _WITH_OFFSETS else None
        return self._tokenizer(text, **options) if known is None else known

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        # Once: transformers looks every special token up in a list, and nothing of a tokenizer changes meanwhile.
        value = self.__dict__[name] = getattr(self._tokenizer, name)
        return value


def tokenize(text: str, tokenizer: Any) -> Piece:
    """A text's ids, without any that the tokenizer would add around it.

    Raises:
        ExampleError: the tokenizer cannot write as text what the data spells out.
    """
    if plain_places(text):
        return _Literal.of(tokenizer, len(tokenizer)).tokenize(text)
    encoded = tokenizer(text, **_WITH_OFFSETS)
    offsets = encoded["offset_mapping"]
    return Piece(list(encoded["input_ids"]), _starts(offsets), [end for _, end in offsets])


def _starts(offsets: list[tuple[int, int]]) -> list[int]:
    # Some byte-level tokenizers trim spaces off their offsets, which leaves a token of spaces only with an empty range
    # behind itself.
    return [start if start < end else max(start - 1, 0) for start, end in offsets]


class _Literal:
    """A copy of a tokenizer that takes special tokens for text, and knows each by another name as well.

    The template's special tokens are written by that name, so that everything around them (spaces that a tokenizer
    adds or strips, what it splits first) is as it always is.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._contents = special_contents(tokenizer)
        self._unknown = tokenizer.unk_token_id
        self._pattern = special_pattern(self._contents.values())
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._names: dict[str, str] = {}
        self._ids: dict[int, int] = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if not token.content or token_id not in self._contents:
                continue
            # As long as the token, so that offsets are the text's.
            name = chr(_FIRST_NAME + len(self._names)) * len(token.content)
            same = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            self._backend.add_tokens([AddedToken(name, special=False, **same)])
            self._names[token.content] = name
            self._ids[self._backend.token_to_id(name)] = token_id
        self._backend.encode_special_tokens = True

    @staticmethod
    @lru_cache(maxsize=4)
    def of(tokenizer: Any, num_tokens: int) -> "_Literal":
        """The copy of a tokenizer with so many tokens; made once, and not before an example needs it."""
        return _Literal(tokenizer)

    def tokenize(self, text: str) -> Piece:
        """Ids and starts of a `RenderedText`.

        Raises:
            ExampleError: a special token that is only text has no other ids.
        """
        encoded = self._backend.encode(self._renamed(text), add_special_tokens=False)
        piece = Piece([], [], [])
        for token_id, (start, end), first in zip(encoded.ids, encoded.offsets, _starts(encoded.offsets), strict=True):
            if self._is_special_after_all(token_id, text[start:end]):
                for at in range(start, end):
                    ids = self._character(text[at])
                    piece += Piece(ids, [at] * len(ids), [at + 1] * len(ids))
            else:
                piece.ids.append(self._ids.get(token_id, token_id))
                piece.starts.append(first)
                piece.ends.append(end)
        return piece

    def _renamed(self, text: str) -> str:
        hidden = list(text)
        for start, end in plain_places(text):
            hidden[start:end] = "\0" * (end - start)
        renamed = list(text)
        for match in self._pattern.finditer("".join(hidden)):
            renamed[slice(*match.span())] = self._names[match[0]]
        return "".join(renamed)

    def _is_special_after_all(self, token_id: int, text: str) -> bool:
        # A vocabulary may hold special tokens as words of its own. A character that it does not know is another matter.
        content = self._contents.get(token_id)
        return content is not None and (token_id != self._unknown or text.strip() == content)

    def _character(self, char: str) -> list[int]:
        anchor = self._backend.encode(ANCHOR, add_special_tokens=False).ids
        ids: list[int] = self._backend.encode(ANCHOR + char, add_special_tokens=False).ids
        ids = ids[len(anchor) :] if ids[: len(anchor)] == anchor else ids
        if any(self._is_special_after_all(token_id, char) for token_id in ids):
            raise ExampleError(
                f"the example spells out the special token {char}, which this tokenizer cannot write as text; take it "
                "out, or set data.parse_special_tokens: true"
            )
        return ids
