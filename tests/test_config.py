"""The run file: what it accepts, and what it says of what it does not."""

import re
from pathlib import Path
from typing import Any

import pytest

from expertune import load_config
from expertune.config import apply_overrides, check_training_arguments, parse_config, parse_size
from expertune.config.origin import Origin
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
    ("override", "meant"),
    [
        ("learning_rate=1e-4", "training.learning_rate"),
        ("lora.seed=3", "training.seed"),
        ("compute_dtype=float32", "quantization.compute_dtype"),
        ("rank=8", "lora.r"),
        ("data.output_dir=runs/b", "output_dir"),
        ("experts=shard", "lora.experts or distributed.experts"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_where_it_belongs(override: str, meant: str, run_file: Path) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key [\w.]+; did you mean {re.escape(meant)}\?"):
        load_config(run_file, [override])


def test_a_key_of_another_section_under_training_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_length is not an argument .*did you mean data\.max_length\?"):
        check_training_arguments({"max_length": 64})


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("lorra: {r: 8}\n", r"unknown key lorra; did you mean lora\?"),
        ("lora: {rnk: 8}\n", "unknown key lora.rnk"),
        ("lora: {alhpa: 8}\n", r"unknown key lora.alhpa; did you mean alpha\?"),
        ("lora: {r: 0}\n", "lora.r: has to be at least 1, got 0"),
        ("lora: {dropout: 1.0}\n", "lora.dropout: has to be below 1, got 1.0"),
        ("lora: {targets: []}\n", r"lora\.targets: has to be a list that is not empty, got \[\]"),
        ("lora: [8]\n", r"lora: has to be a section with keys of its own, got \[8\]"),
        ("lora: {rslora: maybe}\n", "lora.rslora: has to be true or false, got 'maybe'"),
        ("lora: {r: 8.5}\n", "lora.r: has to be a whole number, got 8.5"),
        ("lora: {r: null}\n", "lora.r: has to be a whole number, got null"),
        ("rewards: [{function: exact-match, wight: 2}]\n", "unknown key rewards.0.wight; did you mean weight?"),
        ("lora: {experts: {share: 0.5, laye: {}}}\n", r"unknown key lora\.experts\.laye; did you mean layers\?"),
        ("lora: {rank_pattern: {w1: 0}}\n", r"lora\.rank_pattern\.w1: has to be above 0, got 0"),
        ("quantization: {scheme: int8}\n", "quantization.scheme: .*nf4"),
        ("lora: {r: yes}\n", r"lora\.r: a number or text is wanted, not true or false"),
        ("lora: {rank_pattern: {w1: true}}\n", r"lora\.rank_pattern: a number or text is wanted"),
        ("lora: {alpha: 1.0e30}\n", "lora.alpha: has to be at most 1,000,000, got 1e\\+30"),
        ("lora: {alpha_pattern: {w1: 1.0e30}}\n", r"lora\.alpha_pattern\.w1: has to be at most 1,000,000"),
        ("lora: {loraplus_lr_ratio: 1.0e300}\n", "lora.loraplus_lr_ratio: has to be at most 1,000,000, got"),
        ("lora: {alpha: .inf}\n", "lora.alpha: inf is not a finite number"),
        ("lora: {alpha_pattern: {w1: 0}}\n", r"lora\.alpha_pattern\.w1: has to be above 0, got 0"),
        ("task: {rows: 1:30}\n", "task.rows: .*got '1:30'"),
        ("memory_budget: -3\n", "memory_budget: -3 is not a size; write it as 24GB, 16GiB or a number of bytes$"),
        ("memory_budget: [1]\n", r"^[^\n]*memory_budget: \[1\] is not a size[^\n]*$"),
        ("kernels: {keep: -1}\n", r"^[^\n]*kernels\.keep: write auto, 0 or a size such as 4GB, got -1$"),
        ("kernels: {keep: lots}\n", r"^[^\n]*kernels\.keep: write auto, 0 or a size such as 4GB, got 'lots'$"),
        ("kernels: {working_set: 0}\n", r"^[^\n]*kernels\.working_set: write auto, or a size such as 4GB, got 0$"),
        ("memory_budget: inf\n", "memory_budget: 'inf' is not a size"),
        ("task: {rows: 99999999999999999999}\n", "task.rows: a number of more than 64 bits"),
        ("revision: [[1]]\n2: 3\n", "2: a key must be text, got 2"),
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
        ("lora={r:8}", "r:8: a colon needs a space behind it; write 'r: 8'"),
        ("lora.r=", "no value behind the =; write one, or null"),
        ("revision= ", "no value behind the ="),
        ("lora.rr=3", "unknown key lora.rr"),
    ],
)
def test_wrong_override_is_named(override: str, message: str, run_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [override])


@pytest.mark.parametrize(
    ("addition", "overrides", "named"),
    [
        ("", ["lora.r=x"], "override 'lora.r=x': lora.r: has to be a whole number"),
        ("", ["lora={r: x}"], "override 'lora={r: x}': lora.r: has to be a whole number"),
        ("", ["foo.bar=1"], "RUN with foo.bar=1: unknown key foo"),
        ("lora: {r: x}\n", ["lora.alpha=8"], "RUN: lora.r: has to be a whole number"),
        ("lora: {r: 8}\n", ["data.train=null"], "override 'data.train=null': data.train is missing"),
        ("", ["task.metric=slot-f1", "lora.r=4"], "RUN with task.metric=slot-f1: task.metric needs data.eval"),
        ("task: {metric: slot-f1}\n", ["lora.r=4"], "RUN: task.metric needs data.eval"),
        ("", ["lora.r=y", "lora={r: x}"], "override 'lora={r: x}': lora.r: has to be a whole number"),
    ],
)
def test_a_wrong_value_of_an_override_is_told_as_one_and_not_as_the_file_s(
    addition: str, overrides: list[str], named: str, run_file: Path
) -> None:
    run_file.write_text(MINIMAL + addition, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(run_file, overrides)
    assert str(error.value).startswith(named.replace("RUN", str(run_file)))


def test_a_wrong_value_of_an_override_under_training_is_told_as_one(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "training: {max_steps: 0}\n", encoding="utf-8")
    for overrides, where in (([], str(run_file)), (["training.max_steps=-3"], "override 'training.max_steps=-3'")):
        config = load_config(run_file, overrides)
        with pytest.raises(ConfigError, match=rf"^{re.escape(where)}: training\.max_steps: has to be at least 1"):
            check_training_arguments(config.training, config.origin)


def test_a_secret_of_an_override_is_in_no_error(run_file: Path) -> None:
    config = load_config(run_file, ["training.api_key=abc123"])
    with pytest.raises(ConfigError, match=r"override 'training\.api_key=\.\.\.': training\.api_key is not") as error:
        check_training_arguments(config.training, config.origin)
    assert "abc123" not in str(error.value)


def test_yaml_cannot_build_python_objects(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "revision: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(run_file)


def test_training_key_that_the_run_owns_points_to_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"training\.output_dir is set by the run itself; use output_dir"):
        check_training_arguments({"output_dir": "x"})
    check_training_arguments({"learning_rate": 1.0, "gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("push_to_hub", True, "is not supported: a run uploads nothing; .*hf upload REPOSITORY OUTPUT_DIR/adapter"),
        ("do_train", False, "is false, and a run trains; `expertune evaluate"),
        ("do_predict", True, "is not supported: task.metric"),
    ],
)
def test_training_key_that_asks_for_what_a_run_does_not_do_is_refused(key: str, value: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml: training\.{key} {message}"):
        check_training_arguments({key: value}, Origin("run.yaml"))
    check_training_arguments({key: not value}, Origin("run.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "abc", "has to be a number, got 'abc'"),
        ("learning_rate", "1e-4", "has to be a number, got '1e-4'"),
        ("learning_rate", 0, "has to be above 0, got 0"),
        ("learning_rate", -1e-4, "has to be above 0"),
        ("learning_rate", None, "has to be a number, got null"),
        ("max_steps", 0, r"has to be at least 1 \(or -1"),
        ("max_steps", 2.5, "has to be a whole number"),
        ("max_steps", True, "has to be a whole number"),
        ("num_train_epochs", 0, "has to be above 0"),
        ("per_device_train_batch_size", 0, "has to be at least 1"),
        ("adam_beta2", 1.0, "has to be at least 0 and below 1"),
        ("seed", -1, "has to be at least 0"),
        ("save_total_limit", 0, "has to be at least 1"),
        ("bf16", "yes", "has to be true or false"),
        ("optim", "adamw_torhc", r"no value of this name, got .*; did you mean adamw_torch\?"),
        ("optim", "adamm", r"no value of this name, got .*; did you mean adamw_torch\?"),
        ("optim", "adamw", r"no value of this name, got .*; did you mean adamw_torch\?"),
        ("lr_scheduler_type", "cosin", r"no value of this name, got .*; did you mean cosine\?"),
        ("eval_strategy", "sometimes", "no value of this name, got .*; known: epoch, no, steps"),
        ("lr_scheduler_kwargs", [1], "has to be a mapping or text"),
        ("report_to", ["tensorbaord"], r"no tracker is called 'tensorbaord'; did you mean tensorboard\?"),
        ("report_to", "comet_ml", "comet_ml is not installed here; `pip install comet-ml`"),
    ],
)
def test_training_value_of_a_wrong_type_or_out_of_range_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml: training\.{key}: {message}"):
        check_training_arguments({key: value}, Origin("run.yaml"))


def test_training_values_that_transformers_takes_are_taken() -> None:
    check_training_arguments(
        {
            "learning_rate": 1,
            "warmup_steps": 0.1,
            "max_steps": -1,
            "optim": "paged_adamw_8bit",
            "eval_strategy": False,
            "report_to": ["tensorboard", "wandb"],
            "save_total_limit": None,
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "fsdp": None,
            "debug": "",
        }
    )


def test_section_without_keys_is_an_empty_one(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "training:\nlora:\n", encoding="utf-8")
    assert load_config(run_file).training == {}


def test_text_that_yaml_1_1_would_read_as_a_date_or_an_octal_number_stays_text(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "revision: 2026-01-31\ntraining: {run_name: 0123}\n", encoding="utf-8")
    config = load_config(run_file)
    assert (config.revision, config.training["run_name"]) == ("2026-01-31", "0123")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "task: {metric: slotf1}\n",
            "no metric of this name is registered, got 'slotf1'; did you mean slot-f1?",
        ),
        ("placement: hosts\n", "got 'hosts'; did you mean host?"),
        ("kernels: {route: none-of-them}\n", "got 'none-of-them'"),
    ],
)
def test_value_that_is_nearly_a_name_is_answered_with_it_at_the_end(run_file: Path, lines: str, message: str) -> None:
    run_file.write_text(MINIMAL + lines, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_config(run_file)
    assert str(refused.value).endswith(message)


def test_empty_run_file_is_said_to_be_empty(run_file: Path) -> None:
    run_file.write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml: the file is empty; a run file is a mapping"):
        load_config(run_file)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000), (2**20, 2**20), ("1048576", 2**20)],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("size", [24, "24", " 24 "])
def test_size_that_can_only_be_gigabytes_is_refused_with_its_unit(size: Any) -> None:
    with pytest.raises(ConfigError, match="24 without a unit means bytes; write 24GB"):
        parse_config({"model": "m", "data": {"train": "t"}, "output_dir": "o", "memory_budget": size})


@pytest.mark.parametrize("text", ["a lot", "-3GB", "0", "GB"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_value_of_an_earlier_name_is_read_with_a_note(run_file: Path) -> None:
    config = load_config(run_file, ["kernels.route=decode_then_gemm"])
    assert config.kernels.route == "dequant_gemm"
    assert config.notes == ("kernels.route: decode_then_gemm is now called dequant_gemm",)
    assert config == load_config(run_file, ["kernels.route=dequant_gemm"])


def test_config_survives_the_record(run_file: Path) -> None:
    config = load_config(run_file, ["lora.r=32"])
    assert parse_config(config.model_dump(mode="json", exclude_unset=True)) == config


def test_a_section_that_is_there_twice_is_refused_and_not_half_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "model: m\ndata: {train: t}\noutput_dir: o\ntraining: {max_steps: 3}\ntraining: {seed: 1}\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line 5: training is there twice"):
        load_config(path)


@pytest.mark.parametrize("none", [0, "0", "0GB", "0 GiB", "0.0"])
def test_zero_with_a_unit_keeps_no_more_than_zero(none: Any) -> None:
    config = parse_config({"model": "m", "data": {"train": "t"}, "output_dir": "o", "kernels": {"keep": none}})
    assert config.kernels.keep_bytes == 0


def test_null_on_the_command_line_removes_a_key() -> None:
    values: dict[str, Any] = {"lora": {"r": 4, "alpha": 8}, "training": {"max_grad_norm": 1.0}}
    apply_overrides(values, ["lora.r=null", "training.max_grad_norm=null", "kernels.keep=null"])
    assert values == {"lora": {"alpha": 8}, "training": {"max_grad_norm": None}, "kernels": {}}
