"""A model folder's tokenizer, or one sentence about what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest

from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.errors import CheckpointError

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
