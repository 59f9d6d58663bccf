"""The run file: what it accepts, and what it says of what it does not."""

from pathlib import Path
from typing import Any

import pytest

from expertune import load_config
from expertune.config import check_training_arguments, parse_config, parse_size
from expertune.errors import ConfigError

MINIMAL = "model: some/model\ndata: {train: rows.jsonl}\noutput_dir: runs/x\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_minimal_run_file_takes_the_defaults(run_file: Path) -> None:
    config = load_config(run_file)
    assert config.lora.r == 8
    assert config.data.train_on == "completion"
    assert config.quantization.double_quantization


def test_overrides_reach_sections_and_make_missing_ones(run_file: Path) -> None:
    config = load_config(run_file, ["lora.r=32", "training.learning_rate=1e-4", "lora.targets=[w1, w3]", "data.eval=e"])
    assert config.lora.r == 32
    assert config.training == {"learning_rate": 1e-4}
    assert config.lora.targets == ["w1", "w3"]
    assert config.data.eval == "e"


@pytest.mark.parametrize("text", ["1e-4", "2.5E-5", "1e6", ".5e-3"])
def test_number_in_scientific_notation_is_a_number(text: str, run_file: Path) -> None:
    run_file.write_text(MINIMAL + f"training: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert load_config(run_file).training["learning_rate"] == float(text)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("lorra: {r: 8}\n", r"unknown key lorra; did you mean lora\?"),
        ("lora: {rnk: 8}\n", "unknown key lora.rnk"),
        ("lora: {alhpa: 8}\n", r"unknown key lora.alhpa; did you mean alpha\?"),
        ("lora: {r: 0}\n", "lora.r: .*greater than or equal to 1, got 0"),
        ("lora: {dropout: 1.0}\n", "lora.dropout"),
        ("lora: {targets: []}\n", "lora.targets"),
        ("lora: {rank_pattern: {w1: 0}}\n", "ranks must be 1 or more"),
        ("quantization: {scheme: int8}\n", "quantization.scheme: .*nf4"),
        ("placement: moon\n", "placement"),
        ("task: {metric: slot-f1}\n", "task.metric needs data.eval"),
    ],
)
def test_wrong_key_or_value_is_named_with_the_mend(addition: str, message: str, run_file: Path) -> None:
    run_file.write_text(MINIMAL + addition, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(run_file)
    assert str(run_file) in str(error.value)


def test_all_wrong_keys_are_named_at_once(run_file: Path) -> None:
    run_file.write_text("data: {}\nmodle: x\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(run_file)
    for part in ("model is missing", "data.train is missing", "output_dir is missing", "unknown key modle"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [unclosed", "not valid YAML"),
        (b"- just\n- a list\n", "a run file is a mapping"),
        (b"", "a run file is a mapping"),
        (b"model: \xff\xfe", "UTF-8"),
    ],
)
def test_file_that_is_no_run_file_is_refused(content: bytes, message: str, run_file: Path) -> None:
    run_file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(run_file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such run file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r", "section.key=value"),
        ("=3", "section.key=value"),
        ("model.x=3", "a value, not a section"),
        ("lora.r=[", "not valid YAML"),
        ("lora.rr=3", "unknown key lora.rr"),
    ],
)
def test_wrong_override_is_named(override: str, message: str, run_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [override])


def test_yaml_cannot_build_python_objects(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "revision: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(run_file)


def test_training_key_that_the_run_owns_points_to_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"training\.output_dir is set by the run itself; use output_dir"):
        check_training_arguments({"output_dir": "x"})
    check_training_arguments({"learning_rate": 1.0, "gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), (4096, 4096), ("4096", 4096)]
)
def test_sizes_are_read_in_decimal_and_binary_units(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["a lot", "-3GB", "0", "GB"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_config_survives_the_record(run_file: Path) -> None:
    config = load_config(run_file, ["lora.r=32"])
    assert parse_config(config.model_dump(mode="json", exclude_unset=True)) == config


def test_a_section_that_is_there_twice_is_refused_and_not_half_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "model: m\ndata: {train: t}\noutput_dir: o\ntraining: {max_steps: 3}\ntraining: {seed: 1}\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line 4: training is there twice"):
        load_config(path)
