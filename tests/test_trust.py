"""Python that ships with a model runs where the caller says so, and nowhere else."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import expertune
from expertune import load_config
from expertune.cli import app
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError
from expertune.run.record import RunRecord
from tests.train.conftest import nine_steps, rows_file, run_file, run_values, small_mixtral
from tests.train.scarce import run

__all__ = ["rows_file", "run_file", "run_values", "small_mixtral"]  # fixtures

CODE = """
from pathlib import Path
from transformers import MixtralConfig, MixtralForCausalLM

Path({ran!r}).touch()


class OwnConfig(MixtralConfig):
    pass


class OwnModel(MixtralForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that is there once the model's code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def model_with_code(
    small_mixtral: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Path]]:
    """The small model with a module of its own that its config names, under a model type."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = list(sys.path)

    def make(model_type: str) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(small_mixtral, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {
            "model_type": model_type,
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "own.py").write_text(CODE.format(ran=str(ran)), encoding="utf-8")
        return folder

    yield make
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="expertune")
    return int(ended.value.code or 0)


def test_code_runs_by_the_callers_word_and_never_by_that_of_a_received_run_folder(
    model_with_code: Callable[[str], Path], rows_file: Path, tmp_path: Path, ran: Path
) -> None:
    values = nine_steps(model_with_code("mixtral"), rows_file, tmp_path / "run")
    values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    run(values, tmp_path / "run")
    assert not ran.exists()
    # As an earlier release wrote it, or as somebody would who wants his code to run.
    record = RunRecord.load(tmp_path / "run")
    record.values["config"]["trust_remote_code"] = True
    record.save()
    assert expertune.generate(tmp_path / "run", "What is 1 plus 2?", max_new_tokens=1) is not None
    assert command("evaluate", str(tmp_path / "run"), "--json") == 0
    run(values, tmp_path / "run", resume=True)
    assert not ran.exists()
    assert command("generate", str(tmp_path / "run"), "--prompt", "Who?", "--trust-remote-code") == 0
    assert ran.exists()


@pytest.mark.parametrize("start", ["train", "plan"])
def test_model_that_needs_its_code_names_the_option_before_anything_is_written(
    start: str,
    model_with_code: Callable[[str], Path],
    rows_file: Path,
    run_file: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    ran: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = run_file(nine_steps(model_with_code("own_kind"), rows_file, tmp_path / "run"))
    assert command(start, str(path)) == 2
    told = capsys.readouterr().err
    assert "config.json" in told
    assert "read the code, and if you trust it give --trust-remote-code" in told
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_needs_its_code_names_the_option(small_mixtral: Path, tmp_path: Path) -> None:
    from expertune.checkpoint.tokenizer import load_tokenizer

    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}),
        encoding="utf-8",
    )
    shutil.copy(small_mixtral / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="give --trust-remote-code"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type", "loads"),
    [
        ("OwnTokenizer", "mixtral", False),  # which transformers would read by the class of the model's type
        (None, "mixtral", False),
        ("PreTrainedTokenizerFast", "mixtral", True),
        ("OwnTokenizer", "phimoe", True),  # of which transformers says that it does without
    ],
)
def test_tokenizer_of_a_known_model_is_not_replaced_by_a_plain_one_in_silence(
    small_mixtral: Path, tmp_path: Path, tokenizer_class: str | None, model_type: str, loads: bool
) -> None:
    from expertune.checkpoint.tokenizer import load_tokenizer

    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(small_mixtral / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": tokenizer_class}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}), encoding="utf-8")
    if loads:
        assert load_tokenizer(tmp_path).encode("Who?", add_special_tokens=False)
        return
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded: it comes with Python code of its own"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("overrides", [[], ["trust_remote_code=yes"]])
def test_run_file_that_asks_for_trust_is_refused_with_the_option(
    overrides: list[str], run_values: dict[str, Any], run_file: Callable[[dict[str, Any]], Path]
) -> None:
    path = run_file(run_values if overrides else run_values | {"trust_remote_code": True})
    with pytest.raises(ConfigError, match=r"run\.yaml.*: trust_remote_code is no key.*give --trust-remote-code"):
        load_config(path, overrides)


def test_run_file_that_asks_for_no_trust_says_what_always_holds(run_values: dict[str, Any]) -> None:
    assert parse_config(run_values | {"trust_remote_code": False}) == parse_config(run_values)
