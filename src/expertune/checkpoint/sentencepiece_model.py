"""A folder whose tokenizer is a SentencePiece `tokenizer.model` alone, as folders of older models are.

transformers 5 converts such a file only with further packages, and then to other ids: it orders a BPE's merges
otherwise than SentencePiece does (5.23, a published vocabulary of 32,000 pieces: 43 of 304 texts differ, and all of
them without a `tokenizer_class`). So the file is converted here, and transformers is given the `tokenizer.json` that is
missing.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from expertune.errors import CheckpointError

NAME = "tokenizer.model"

# Kinds of models and of pieces in SentencePiece's own format, sentencepiece_model.proto.
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"


def needs_conversion(folder: Path) -> bool:
    """Whether a folder's tokenizer is a SentencePiece file and nothing that transformers reads as it is."""
    if not (folder / NAME).is_file() or any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return False
    # A tokenizer that brings its own Python reads the file itself.
    return "auto_map" not in _config(folder)


@contextmanager
def converted(folder: Path) -> Iterator[Path]:
    """A temporary folder with the small files of `folder` and the `tokenizer.json` made from its `tokenizer.model`.

    Raises:
        CheckpointError: the file is no SentencePiece model, or one of a kind that cannot be converted.
    """
    proto = _read(folder / NAME)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(proto), **_config(folder)}
    with tempfile.TemporaryDirectory(prefix="expertune-tokenizer-") as name:
        beside = Path(name)
        for file in folder.iterdir():
            if file.suffix in (".json", ".jinja") and file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, beside / file.name)
        (beside / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        _convert(folder / NAME, proto).save(str(beside / "tokenizer.json"))
        yield beside


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be an object of settings, got {type(values).__name__}")
    return values


def _read(path: Path) -> Any:
    # The format's classes come with transformers, and read with protobuf (transformers 5.20 to 5.24).
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error}); {_advice(path)}") from None
    if not proto.pieces or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"{path}: not a SentencePiece model of the kind BPE or Unigram; {_advice(path)}")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise CheckpointError(f"{path}: a SentencePiece model that puts spaces behind words; {_advice(path)}")
    return proto


def _advice(path: Path) -> str:
    return f"put the tokenizer.json of the same model into {path.parent}"


def _special_tokens(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[each].piece for name, each in ids.items() if 0 <= each < len(proto.pieces)}


def _convert(path: Path, proto: Any) -> Tokenizer:
    special = _special_tokens(proto)
    model: models.BPE | models.Unigram
    if proto.trainer_spec.model_type == _BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        if len(vocabulary) < len(proto.pieces):
            raise CheckpointError(f"{path}: holds a piece twice; {_advice(path)}")
        byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
        model = models.BPE(
            vocabulary,
            _merges(proto, vocabulary),
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scored, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)
    tokenizer = Tokenizer(model)
    _normalize(tokenizer, proto.normalizer_spec)
    added = [piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    tokens = [AddedToken(each.piece, normalized=False, special=each.type != _USER_DEFINED) for each in added]
    tokenizer.add_special_tokens([token for token in tokens if token.special])
    tokenizer.add_tokens([token for token in tokens if not token.special])
    if bos := special.get("bos_token"):
        # SentencePiece's own callers put it first by its setting; all models of this kind are tuned with it.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, proto.trainer_spec.bos_id)]
        )
    return tokenizer


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best piece first, as SentencePiece merges."""
    merges = []
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        for at in range(1, len(piece.piece)):
            left, right = piece.piece[:at], piece.piece[at:]
            if left in vocabulary and right in vocabulary:
                merges.append((-piece.score, -len(left), -len(right), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _normalize(tokenizer: Tokenizer, spec: Any) -> None:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
