"""A config is read without its weights' dtype, for which transformers would import torch; all else is the same."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from expertune.checkpoint.context import context_length, read_config
from tests.planning.conftest import FILES
from tests.tiny_models import FAMILIES, tiny_config


@pytest.fixture(params=[*sorted(path.name for path in FILES.iterdir()), *FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of a published model's config, or of a tiny one."""
    if (FILES / request.param).is_dir():
        return FILES / request.param
    tiny_config(request.param, dtype="bfloat16").save_pretrained(tmp_path)
    return tmp_path


def test_a_config_without_its_dtype_is_the_same_config(folder):
    usual, read = AutoConfig.from_pretrained(folder), read_config(folder)
    assert type(read) is type(usual)
    assert read.to_dict() == usual.to_dict() | {"dtype": None}
    assert read.name_or_path == usual.name_or_path
    assert context_length(read) == context_length(usual) > 0


def test_dtypes_of_configs_within_go_as_well(tmp_path):
    text = {"model_type": "mixtral", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**text, "text_config": text}))
    assert read_config(tmp_path).text_config == {"model_type": "mixtral"}
