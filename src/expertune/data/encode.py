"""Examples and prompts as token ids, so that generation starts from the very ids that training saw.

An example is tokenized as a whole where the prompt's ids are a prefix of the example's. Where a token would straddle
the boundary, the completion is tokenized as a continuation instead. Either way `encode_prompt(prompt)` is a prefix.
Earlier answers of a conversation are treated likewise: where a token would straddle the start of one, the text is split
there.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from expertune.data.column_template import Rendered
from expertune.data.examples import IGNORE_INDEX
from expertune.data.lint import ExampleError, check_unicode
from expertune.data.special_tokens import (
    RenderedText,
    answer_starts,
    part_of,
    plain_places,
    text_of,
)
from expertune.data.text_ids import ANCHOR, Piece, tokenize
from expertune.errors import ConfigError


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


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Ids that generation starts from: BOS (or what the tokenizer puts first) once, then the prompt, no EOS.

    Args:
        prompt: `TokenizedExample.prompt`, or what `Questions.render` returns; in any other string special tokens that
            are spelled out are special tokens.
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


def _tokenize_in_two(text: str, boundary: int, tokenizer: Any) -> Piece:
    prompt, split = _tokenize_answers(part_of(text, 0, boundary), tokenizer)
    # What stands before the last split is tokenized by itself, so only the rest can straddle the boundary.
    before = _tokenize_part(text, split, boundary, tokenizer) if split else prompt
    whole = _tokenize_part(text, split, len(text), tokenizer)
    count = len(before.ids)
    if whole.ids[:count] == before.ids:
        completion = whole.after(count)
        starts = [max(start, boundary) for start in completion.starts]
        return prompt + Piece(completion.ids, starts, completion.ends)
    return prompt + _tokenize_part(text, boundary, len(text), tokenizer)


def _tokenize_answers(text: str, tokenizer: Any) -> tuple[Piece, int]:
    """Tokenize a text, split where a token would straddle the start of an answer; the last such place, 0 for none.

    Raises:
        ExampleError: a token that is straddling cannot be split.
    """
    whole, places = tokenize(text, tokenizer), answer_starts(text)
    splits = _straddled(places, text, whole, tokenizer) if places else []
    if not splits:
        return whole, 0
    edges = [0, *splits, len(text)]
    piece = Piece([], [], [])
    for start, end in pairwise(edges):
        piece += _tokenize_part(text, start, end, tokenizer)
    return piece, splits[-1]


def _straddled(places: Sequence[int], text: str, piece: Piece, tokenizer: Any) -> list[int]:
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


def _tokenize_part(text: str, start: int, end: int, tokenizer: Any) -> Piece:
    part = part_of(text, start, end)
    return (_tokenize_continuation if start else tokenize)(part, tokenizer).placed(start)


def _tokenize_continuation(text: str, tokenizer: Any) -> Piece:
    anchor = tokenize(ANCHOR, tokenizer)
    places = [(start + len(ANCHOR), end + len(ANCHOR)) for start, end in plain_places(text)]
    anchored = tokenize(RenderedText(ANCHOR + text, places), tokenizer)
    count = len(anchor.ids)
    if anchored.ids[:count] == anchor.ids:
        behind, shift = anchored.after(count), len(ANCHOR)
        return Piece(behind.ids, [at - shift for at in behind.starts], [at - shift for at in behind.ends])
    return tokenize(text, tokenizer)


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
