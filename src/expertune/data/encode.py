"""From text to token ids, so that generation starts from the very ids that training saw.

An example is tokenized as a whole where the prompt's ids are a prefix of the example's. Where a token would straddle
the boundary, the completion is tokenized as a continuation instead. Either way `encode_prompt(prompt)` is a prefix.
Earlier answers of a conversation are treated likewise: where a token would straddle the start of one, the text is split
there.

Special tokens that the data spells out (`RenderedText.plain`) are tokenized as the text that they are there.
"""

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

from expertune.data.column_template import Rendered
from expertune.data.examples import IGNORE_INDEX
from expertune.data.lint import ExampleError, check_unicode, half_character
from expertune.data.special_tokens import (
    RenderedText,
    answer_starts,
    part_of,
    plain_places,
    special_contents,
    special_pattern,
    text_of,
)
from expertune.errors import ConfigError

# Tokenizers of the SentencePiece kind put a space in front of whatever text they are given. Behind a line break, which
# they never join with what follows, a continuation gets the ids it has in the middle of a text.
_ANCHOR = "\n"

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
class _Piece:
    """Ids of a text and the characters between which each lies."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def after(self, count: int) -> "_Piece":
        return _Piece(self.ids[count:], self.starts[count:], self.ends[count:])

    def placed(self, at: int) -> "_Piece":
        """The piece of a text that starts at this character of the whole."""
        # A token starts in its own text, whatever its offsets say about the space before its first letter.
        return _Piece(self.ids, [max(start, 0) + at for start in self.starts], [end + at for end in self.ends])

    def __add__(self, other: "_Piece") -> "_Piece":
        return _Piece(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse tokenizers that examples cannot be made with.

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
        return getattr(self._tokenizer, name)


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Ids that generation starts from: BOS (or what the tokenizer puts first) once, then the prompt, no EOS.

    Args:
        prompt: `TokenizedExample.prompt`, or what `render_prompt` returns; in any other string special tokens that are
            spelled out are special tokens.
        tokenizer: a fast transformers tokenizer.

    Returns:
        Token ids; for an example's prompt they are a prefix of the example's `input_ids`.

    Raises:
        ExampleError: the tokenizer cannot write as text what the data spells out, or half a surrogate pair is in it.
    """
    check_unicode(prompt)
    ids = _tokenize_answers(prompt, tokenizer)[0].ids
    return _lead(ids, tokenizer) + ids


def encode_example(rendered: Rendered, train_on: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a rendered example, before any cut.

    Args:
        rendered: the example as text.
        train_on: `DataConfig.train_on`.
        tokenizer: a fast transformers tokenizer.

    Returns:
        (input_ids, labels), equally long; EOS once at the end where the text does not hold it, and always trained.

    Raises:
        ExampleError: the tokenizer cannot write as text what the data spells out, or an answer starts inside a token
            that cannot be split.
    """
    piece = _tokenize_in_two(text_of(rendered), rendered.spans[-1][0], tokenizer)
    lead = _lead(piece.ids, tokenizer)
    trained = [True] * len(piece.ids) if train_on == "all" else _inside(piece.starts, rendered.spans)
    if rendered.untrained:
        untrained = _inside(piece.starts, rendered.untrained)
        trained = [yes and not no for yes, no in zip(trained, untrained, strict=True)]
    own = [token_id if yes else IGNORE_INDEX for token_id, yes in zip(piece.ids, trained, strict=True)]
    labels = [IGNORE_INDEX] * len(lead) + own
    input_ids = lead + piece.ids
    if train_on == "all":
        labels[: len(lead)] = lead
    # Nothing stands before the first token that it could be predicted from.
    labels[:1] = [IGNORE_INDEX] * len(labels[:1])
    if rendered.append_eos:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return input_ids, labels


def _inside(starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token starts in one of the spans."""
    inside = [False] * len(starts)
    for start, end in spans:
        inside = [known or start <= begin < end for known, begin in zip(inside, starts, strict=True)]
    return inside


def _tokenize(text: str, tokenizer: Any) -> _Piece:
    if plain_places(text):
        return _Literal.of(tokenizer, len(tokenizer)).tokenize(text)
    encoded = tokenizer(text, **_WITH_OFFSETS)
    offsets = encoded["offset_mapping"]
    return _Piece(list(encoded["input_ids"]), _starts(offsets), [end for _, end in offsets])


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

    def tokenize(self, text: str) -> _Piece:
        """Ids and starts of a `RenderedText`.

        Raises:
            ExampleError: a special token that is only text has no other ids.
        """
        encoded = self._backend.encode(self._renamed(text), add_special_tokens=False)
        piece = _Piece([], [], [])
        for token_id, (start, end), first in zip(encoded.ids, encoded.offsets, _starts(encoded.offsets), strict=True):
            if self._is_special_after_all(token_id, text[start:end]):
                for at in range(start, end):
                    ids = self._character(text[at])
                    piece += _Piece(ids, [at] * len(ids), [at + 1] * len(ids))
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
        anchor = self._backend.encode(_ANCHOR, add_special_tokens=False).ids
        ids: list[int] = self._backend.encode(_ANCHOR + char, add_special_tokens=False).ids
        ids = ids[len(anchor) :] if ids[: len(anchor)] == anchor else ids
        if any(self._is_special_after_all(token_id, char) for token_id in ids):
            raise ExampleError(
                f"the example spells out the special token {char}, which this tokenizer cannot write as text; take it "
                "out, or set data.parse_special_tokens: true"
            )
        return ids


def _tokenize_in_two(text: str, boundary: int, tokenizer: Any) -> _Piece:
    prompt, split = _tokenize_answers(part_of(text, 0, boundary), tokenizer)
    # What stands before the last split is tokenized by itself, so only the rest can straddle the boundary.
    before = _tokenize_part(text, split, boundary, tokenizer) if split else prompt
    whole = _tokenize_part(text, split, len(text), tokenizer)
    count = len(before.ids)
    if whole.ids[:count] == before.ids:
        completion = whole.after(count)
        starts = [max(start, boundary) for start in completion.starts]
        return prompt + _Piece(completion.ids, starts, completion.ends)
    return prompt + _tokenize_part(text, boundary, len(text), tokenizer)


def _tokenize_answers(text: str, tokenizer: Any) -> tuple[_Piece, int]:
    """Tokenize a text, split where a token would straddle the start of an answer; the last such place, 0 for none.

    Raises:
        ExampleError: a token that is straddling cannot be split.
    """
    whole, places = _tokenize(text, tokenizer), answer_starts(text)
    splits = _straddled(places, text, whole, tokenizer) if places else []
    if not splits:
        return whole, 0
    edges = [0, *splits, len(text)]
    piece = _Piece([], [], [])
    for start, end in pairwise(edges):
        piece += _tokenize_part(text, start, end, tokenizer)
    return piece, splits[-1]


def _straddled(places: Sequence[int], text: str, piece: _Piece, tokenizer: Any) -> list[int]:
    """Those of the places that lie inside a token."""
    found, behind, added = set(), 0, tokenizer.added_tokens_decoder
    for token_id, start, end in zip(piece.ids, piece.starts, piece.ends, strict=True):
        # Offsets that leave out a space leave it between the token before and its own.
        begin, behind = min(start, behind), max(end, behind)
        for place in places[bisect_right(places, begin) : bisect_left(places, end)]:
            if token_id not in added:
                found.add(place)
                continue
            # Added tokens may take in the spaces around them: those before can be split off, those behind are lost.
            spelled = text[start:end]
            if place >= start + len(spelled.rstrip()):
                continue
            if place > start + len(spelled) - len(spelled.lstrip()):
                raise ExampleError(
                    f"an answer starts inside the token {added[token_id].content}, which cannot be split; the template "
                    "must write the whole token before the answer, or in it"
                )
            found.add(place)
    return sorted(found)


def _tokenize_part(text: str, start: int, end: int, tokenizer: Any) -> _Piece:
    part = part_of(text, start, end)
    return (_tokenize_continuation if start else _tokenize)(part, tokenizer).placed(start)


def _tokenize_continuation(text: str, tokenizer: Any) -> _Piece:
    anchor = _tokenize(_ANCHOR, tokenizer)
    places = [(start + len(_ANCHOR), end + len(_ANCHOR)) for start, end in plain_places(text)]
    anchored = _tokenize(RenderedText(_ANCHOR + text, places), tokenizer)
    count = len(anchor.ids)
    if anchored.ids[:count] == anchor.ids:
        behind, shift = anchored.after(count), len(_ANCHOR)
        return _Piece(behind.ids, [at - shift for at in behind.starts], [at - shift for at in behind.ends])
    return _tokenize(text, tokenizer)


def _lead(ids: list[int], tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text (BOS, mostly), unless the text already starts with it."""
    lead = list(_put_in_front(tokenizer, getattr(tokenizer, "add_bos_token", None)))
    return [] if ids[: len(lead)] == lead else lead


@lru_cache(maxsize=4)
def _put_in_front(tokenizer: Any, add_bos_token: bool | None) -> tuple[int, ...]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    count = next((index for index in range(len(full)) if full[index : index + len(plain)] == plain), 0)
    return tuple(full[:count])
