"""Every example is a run file that this release takes; the recipe's settings and figures are the tutorial's."""

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from expertune import load_config
from expertune.config import RunConfig, Section, check_training_arguments
from expertune.planning import make_plan
from expertune.train.arguments import training_arguments

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MIXTRAL = ROOT / "tests" / "planning" / "files" / "mixtral-8x7b-v0.1"

RECIPE_LINE = "trainable params: 120350720 || all params: 23602952192 || trainable%: 0.5098968934945001"


def example(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "examples" / name, overrides)


def test_there_are_examples() -> None:
    names = {path.name for path in EXAMPLES}
    assert {"demo.yaml", "mixtral-dolly.yaml", "mixtral-dolly-better.yaml", "viggo-mixtral.yaml"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_loads_and_transformers_takes_its_training_section(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    check_training_arguments(config.training, config.origin, config.objective)
    args, _ = training_arguments(config.training, str(tmp_path), torch.device("cpu"), config.objective)
    assert args.learning_rate == config.training["learning_rate"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_local_files_of_an_example_are_in_the_repository(path: Path) -> None:
    config = load_config(path)
    for source in (config.model, config.data.train, config.data.eval):
        if source and source.startswith("src/"):
            assert (ROOT / source.split("[")[0]).exists()


def test_recipe_is_the_tutorial_setting_for_setting() -> None:
    config = example("mixtral-dolly.yaml")
    assert config.model == "mistralai/Mixtral-8x7B-v0.1"
    assert config.data.train == "databricks/databricks-dolly-15k[0:800]"
    assert config.data.eval == "databricks/databricks-dolly-15k[800:1000]"
    assert (config.data.template, config.data.max_length) == ("dolly-tutorial", 320)
    assert (config.data.packing, config.data.train_on) == ("padded", "all")
    assert config.quantization.double_quantization
    assert config.quantization.compute_dtype == "bfloat16"
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert config.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head"]
    assert config.training == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 500,
        "warmup_steps": 5,
        "learning_rate": 2.5e-5,
        "bf16": True,
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "logging_steps": 25,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "save_strategy": "steps",
        "save_steps": 50,
        "report_to": "wandb",
    }


def test_recipe_gets_the_tutorials_run_name(tmp_path: Path) -> None:
    args, _ = training_arguments(example("mixtral-dolly.yaml").training, str(tmp_path / "run"), torch.device("cpu"))
    assert re.fullmatch(r"run-\d{4}-\d\d-\d\d-\d\d-\d\d", args.run_name)


def test_better_run_differs_in_settings_only_not_in_what_is_trained() -> None:
    recipe, better = example("mixtral-dolly.yaml"), example("mixtral-dolly-better.yaml")
    assert better.lora == recipe.lora
    assert (better.model, better.data.train, better.data.eval) == (recipe.model, recipe.data.train, recipe.data.eval)


def plan_of(name: str) -> Any:
    return make_plan(example(name, f"model={MIXTRAL}", "memory_budget=40GB"), device="cuda")


def test_plan_of_the_recipe_gives_the_tutorials_figures_and_those_of_the_pages() -> None:
    plan = plan_of("mixtral-dolly.yaml")
    assert plan.parameters.line == RECIPE_LINE
    assert plan.parameters.total == 46_702_792_704
    assert plan.weights.frozen_bytes == 24_483_540_992
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert RECIPE_LINE in readme
    assert f"a peak of {plan.memory.peak_bytes / 1e9:.1f} GB" in readme


@pytest.mark.parametrize("name", ["mixtral-dolly.yaml", "mixtral-dolly-better.yaml", "viggo-mixtral.yaml"])
def test_mixtral_examples_fit_one_gpu_of_40_gigabytes(name: str) -> None:
    assert plan_of(name).fits


# The reference of the run file.

PAGE = (ROOT / "docs" / "reference" / "run-file.md").read_text(encoding="utf-8")
SECTIONS = {"Top level": RunConfig} | {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def rows_of(section: str) -> dict[str, tuple[str, str]]:
    """key -> (type, default) in the page's table for a section."""
    part = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert part, f"no section {section}"
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .+ \|$", part[1], re.MULTILINE)
    return {key: (kind, default) for key, kind, default in rows}


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "defaults" if isinstance(field.default, BaseModel) else json.dumps(field.default)


@pytest.mark.parametrize("section", SECTIONS)
def test_reference_lists_every_key_with_its_default(section: str) -> None:
    fields = SECTIONS[section].model_fields
    documented = rows_of(section)
    assert list(documented) == list(fields)
    assert {key: default for key, (_, default) in documented.items()} == {k: default_of(f) for k, f in fields.items()}


@pytest.mark.parametrize("section", SECTIONS)
def test_reference_lists_every_value_of_a_choice(section: str) -> None:
    part = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    for key, field in SECTIONS[section].model_fields.items():
        options = (field.annotation, *get_args(field.annotation))
        choices = [str(value) for option in options if get_origin(option) is Literal for value in get_args(option)]
        row = next(line for line in part.splitlines() if line.startswith(f"| `{key}`"))
        assert [choice for choice in choices if choice not in row] == []
