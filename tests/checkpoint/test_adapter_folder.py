"""What of an adapter's folder is read before any library is loaded."""

import json
from pathlib import Path

import pytest

from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, require_beginning
from expertune.config import LoraSection
from expertune.errors import ConfigError


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """The folder of an adapter as PEFT's own calls write it: what it was trained with stands in its config alone."""
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}), encoding="utf-8")
    (tmp_path / WEIGHTS_NAME).write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path


@pytest.mark.parametrize(("key", "value", "found"), [("r", 8, 4), ("alpha", 16, 8)])
def test_value_that_an_adapter_of_another_program_contradicts_is_refused_at_a_glance(
    stock: Path, key: str, value: int, found: int
) -> None:
    with pytest.raises(ConfigError, match=rf"^lora\.{key} is {value}, but the adapter at {stock} has {found}; remove"):
        require_beginning(LoraSection(init_from=str(stock), **{key: value}))
    require_beginning(LoraSection(init_from=str(stock), **{key: found}))


@pytest.mark.parametrize("damage", ["", "[]", '{"r": "4"}', '{"r": null, "lora_alpha": 8}'])
def test_damaged_config_is_left_to_those_who_read_it(stock: Path, damage: str) -> None:
    (stock / CONFIG_NAME).write_text(damage, encoding="utf-8")
    require_beginning(LoraSection(init_from=str(stock), r=8))
