"""What the pages say that the program does, it does: messages, options, plans and lists, taken from the pages."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from rich.console import Console
from transformers import TrainingArguments

from expertune import load_config
from expertune.cli import app
from expertune.config import check_training_arguments, parse_config
from expertune.errors import ConfigError
from expertune.planning import Plan, make_plan
from expertune.run.directory import _FREE_AT_RESUME

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
MIXTRAL = ROOT / "tests" / "planning" / "files" / "mixtral-8x7b-v0.1"
VALUES = {"model": "m", "data": {"train": "t"}, "output_dir": "o"}

# Said by a library, or by the program with a word in it that is no constant of its source.
NOT_OURS = (
    "Failed to load CPU gemm_4bit_forward",
    "rank_pattern keys did not match",
    "training.learning_rate: has to be",  # pydantic's words, held in tests/test_config.py
)


def page(name: str) -> str:
    """A page's text, each run of white space as one space."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def plan_of(example: str, *overrides: str, **machine: str) -> Plan:
    return make_plan(load_config(ROOT / "examples" / example, [f"model={MIXTRAL}", *overrides]), **machine)


def own_words() -> Iterator[str]:
    """The constant pieces of every text in the source."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    said = "\n".join(own_words())
    messages = re.findall(r"^\| `(.+?)`", (GUIDES / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages) > 30
    unknown = []
    for part in (part.strip() for message in messages for part in message.split("...")):
        words = part.split()
        if len(words) < 4 or part.startswith(NOT_OURS):
            continue
        # Words that stand beside the same ones in the program's own text; the others are names, numbers and paths.
        known = {
            word
            for start in range(len(words) - 1)
            if " ".join(words[start : start + 2]) in said
            for word in range(start, start + 2)
        }
        if len(known) < 0.5 * len(words):
            unknown.append(part)
    assert unknown == []


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("lora", "rank", "r"),
        ("lora", "lora_alpha", "alpha"),
        ("lora", "target_modules", "targets"),
        ("lora", "lora_dropout", "dropout"),
        ("data", "max_seq_length", "max_length"),
    ],
)
def test_misspelt_key_is_answered_with_the_key_that_is_meant(section: str, key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key {section}.{key}; did you mean {meant}\\?"):
        parse_config(VALUES | {section: VALUES.get(section, {}) | {key: 8}}, where="run.yaml")


def test_message_of_a_misspelt_training_argument_is_that_of_the_page() -> None:
    with pytest.raises(ConfigError) as refused:
        check_training_arguments({"learning_rat": 1e-4})
    assert str(refused.value).removeprefix("config: ") in page("docs/guides/troubleshooting.md")


def test_keys_that_may_change_at_resume_are_those_of_the_page_and_of_transformers() -> None:
    listed = re.search(r"Free to change: (.*?), and ", page("docs/guides/resume-and-checkpoints.md"))
    assert listed
    keys = {key.removeprefix("training.") for key in re.findall(r"`([\w.]+)`", listed[1])}
    assert keys == _FREE_AT_RESUME
    assert keys <= {field.name for field in dataclasses.fields(TrainingArguments)}


def test_argument_that_transformers_has_dropped_is_refused_with_what_replaces_it() -> None:
    with pytest.raises(ConfigError, match=r"training\.logging_dir is no longer .* TENSORBOARD_LOGGING_DIR"):
        check_training_arguments({"logging_dir": "logs"})


def test_commands_page_has_every_option_of_every_command() -> None:
    usage = re.search(r"```text\n(.*?)```", (GUIDES / "commands.md").read_text(encoding="utf-8"), re.DOTALL)
    assert usage
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines = " ".join(line for line in usage[1].splitlines() if line.startswith(f"expertune {name} "))
        options = [[*each.opts, *each.secondary_opts] for each in command.params]
        shown = [names for names in options if names[0].startswith("--") and names[0] != "--verbose"]
        # Of a switch that is on by default its opposite is shown.
        assert [names for names in shown if not any(option in lines for option in names)] == []


def test_plan_that_the_plan_page_shows_is_the_plan() -> None:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(plan_of("mixtral-dolly.yaml", gpu="h100", memory="40GB").render())
    shown = re.search(r"```text\n(parameters .*?)```", (GUIDES / "plan.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    made = " ".join(capture.get().split())
    assert [line for line in shown[1].splitlines() if " ".join(line.split()) not in made] == []


def test_mixtral_on_a_card_of_24_gigabytes_is_what_the_guide_says() -> None:
    text = page("docs/guides/mixtral-on-one-gpu.md")
    on_24 = plan_of("mixtral-dolly.yaml", gpu="rtx-4090")
    layers = on_24.to_json()["placement"]["layers"]
    assert on_24.fits
    assert f"{layers['host']} of {layers['host'] + layers['device']} layers on an RTX 4090" in text
    assert "memory_budget=32GB data.max_length=2048" in text
    on_32 = plan_of("mixtral-dolly-better.yaml", "memory_budget=32GB", "data.max_length=2048", device="cuda")
    assert on_32.fits
    assert set(on_32.to_json()["placement"]["layers"]) == {"device"}


def test_peak_with_a_smaller_working_set_is_that_of_the_readme() -> None:
    plan = plan_of("mixtral-dolly.yaml", "memory_budget=40GB", "kernels.working_set=512MiB", device="cuda")
    assert f"({plan.memory.peak_bytes / 1e9:.1f} GB with `kernels.working_set: 512MiB`)" in page("README.md")


def test_bytes_and_counts_of_the_concept_pages_are_the_plans() -> None:
    plan = plan_of("mixtral-dolly.yaml", "memory_budget=40GB", device="cuda")
    weights, text = plan.weights, page("docs/concepts/4-bit-experts.md")
    assert f"| experts | {weights.experts_bytes / 1e9:.2f} GB |" in text
    assert f"| linears of the decoder layers | {weights.linears_bytes / 1e9:.2f} GB |" in text
    unquantized = weights.unquantized_bytes + weights.buffers_bytes
    assert f"| embeddings, output head, routers, norms | {unquantized / 1e9:.2f} GB |" in text
    assert f"| **frozen, in all** | **{weights.frozen_bytes / 1e9:.2f} GB** |" in text
    experts = 32 * 8 * 3 * 4096 * 14336
    assert f"{experts:,} of Mixtral-8x7B's {plan.parameters.total:,}" in text
    assert f"{8 * weights.experts_bytes / experts:.3f} bits a weight, {weights.experts_bytes / 1e9:.2f} GB" in text
    assert f"| {plan.parameters.trainable:,} |" in page("docs/concepts/adapters.md")
    assert f"A layer of Mixtral-8x7B is {weights.experts_bytes / 32 / 1e9:.2f} GB" in page("docs/concepts/placement.md")
