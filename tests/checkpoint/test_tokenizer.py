"""A model folder's tokenizer, or one sentence about what is wrong with it."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from google.protobuf.message import Message
from transformers import AutoConfig, AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.errors import CheckpointError
from tests.tiny_models import tiny_config

ASSET = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(ASSET / name, tmp_path / name)
    return tmp_path


def test_tokenizer_of_the_embedded_model_loads(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.decode(tokenizer("Alice was beginning")["input_ids"], skip_special_tokens=True).strip()


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(ASSET / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_5_moe_text"])
def test_folder_without_a_vocabulary_is_refused_where_transformers_makes_an_empty_tokenizer(kind, kept, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    added = {str(1 + at): {"content": token, "special": False} for at, token in enumerate(["<tool>", "<think>"])}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "added_tokens_decoder": added}
    for name in kept:
        (tmp_path / name).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no token for ordinary text .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {', encoding="utf-8")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_tokenizer_without_an_end_of_sequence_token_is_refused(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        load_tokenizer(folder)


MIXTRAL = Path(__file__).parents[1] / "data" / "files" / "mixtral-tokenizer"

TEXTS = [
    "Say </s> now<s>a</s>b",
    "  two  spaces ",
    "\n\n x\t\ty  \n  z",
    "\u65e5\u672c \U0001f600 caf\u00e9",
    "",
    " ",
    "inform(name[Dirt: Showdown], release_year[2012], esrb[T (for Teen)])",
    "Ada Lovelace was born in 1815. What did she write, and for whom?",
]


@pytest.fixture(scope="module")
def mixtral_json():
    return json.loads(gzip.decompress((MIXTRAL / "tokenizer.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, mixtral_json):
    """Mixtral's tokenizer.json, read by transformers."""
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_json), encoding="utf-8")
    shutil.copyfile(MIXTRAL / "tokenizer_config.json", folder / "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def proto(mixtral_json) -> Message:
    """Mixtral's tokenizer.model, put together from its tokenizer.json as SentencePiece wrote it.

    Pieces in the order of their ids, each with a lower score than the one before; pieces of spaces come last.
    """
    model = import_protobuf().ModelProto()
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.byte_fallback = 2, True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = True, False
    for piece, token_id in sorted(mixtral_json["model"]["vocab"].items(), key=lambda item: item[1]):
        kind = {0: 2, 1: 3, 2: 3}.get(token_id, 6 if token_id < 259 else 1)
        score = -1e9 if not piece.strip("\u2581") else 259.0 - token_id if kind == 1 else 0.0
        model.pieces.add(piece=piece, score=score, type=kind)
    return model


def test_sentencepiece_file_alone_gives_the_ids_of_the_models_tokenizer_json(tmp_path, mixtral, proto):
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    for name in ("bare", "with its config"):
        if name != "bare":
            shutil.copyfile(MIXTRAL / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
        tokenizer = load_tokenizer(tmp_path)
        for text in TEXTS:
            expected = mixtral(text, return_offsets_mapping=True)
            found = tokenizer(text, return_offsets_mapping=True)
            assert (found["input_ids"], found["offset_mapping"]) == (
                expected["input_ids"],
                expected["offset_mapping"],
            )
            assert tokenizer.decode(found["input_ids"]) == mixtral.decode(expected["input_ids"])
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        assert tokenizer.name_or_path == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]


def test_unigram_model_takes_the_likeliest_pieces(tmp_path):
    model = import_protobuf().ModelProto()
    spec = model.trainer_spec
    spec.model_type, spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 1, 0, -1, 1, -1
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    pieces = [("<unk>", 0.0, 2), ("</s>", 0.0, 3), ("\u2581", -2.0, 1), ("\u2581ab", -3.0, 1), ("ab", -3.5, 1)]
    for piece, score, kind in [*pieces, ("a", -4.0, 1), ("b", -4.0, 1), ("<keep>", 0.0, 4)]:
        model.pieces.add(piece=piece, score=score, type=kind)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("  ab   aab<keep>")["input_ids"])
    assert tokens == ["\u2581ab", "\u2581", "a", "ab", "<keep>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\n", r"tokenizer\.model: not a SentencePiece model"),
        (b"", r"tokenizer\.model: not a SentencePiece model"),
    ],
)
def test_file_that_is_no_sentencepiece_model_is_an_error_with_advice(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "put the tokenizer.json of the same model into" in str(caught.value)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (ASSET / name).exists():
            shutil.copyfile(ASSET / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(load_tokenizer(tmp_path)) == config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 2}))
    last = config["vocab_size"] - 1
    with pytest.raises(CheckpointError, match=rf"2 tokens that the model has no embedding .* has the id {last}, but"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"max_position_embeddings": 128, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 512),
        # Qwen's way to switch YaRN on, and DeepSeek's to write it down.
        (
            {
                "max_position_embeddings": 128,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            },
            512,
        ),
        (
            {
                "max_position_embeddings": 640,
                "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16},
            },
            640,
        ),
    ],
)
def test_context_is_what_the_positions_reach(tmp_path, values, expected):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    assert context_length(read_config(tmp_path)) == expected


def test_model_without_such_a_length_has_no_limit(tmp_path):
    assert context_length(AutoConfig.for_model("mamba")) is None
    assert context_length(read_config(tmp_path)) is None
