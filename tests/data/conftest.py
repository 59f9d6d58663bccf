import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

FILES = Path(__file__).parent / "files"
ASSETS = Path(__file__).parents[2] / "src" / "expertune" / "assets"


@pytest.fixture(scope="session")
def files():
    return FILES


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-mixtral")


@pytest.fixture(scope="session")
def mixtral_tokenizer(tmp_path_factory):
    """Mixtral-8x7B-v0.1's own tokenizer: SentencePiece kind, BOS in front, no padding token."""
    folder = tmp_path_factory.mktemp("mixtral-tokenizer")
    for source in (FILES / "mixtral-tokenizer").iterdir():
        content = source.read_bytes()
        unzipped = gzip.decompress(content) if source.suffix == ".gz" else content
        (folder / source.name.removesuffix(".gz")).write_bytes(unzipped)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def jsonl(tmp_path):
    """Write examples to a JSONL file and return its path as text."""

    def write(*examples, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return str(path)

    return write
