"""What a Python program gives the public functions: a mistake is one error that names the argument and the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import expertune
from expertune import ExpertuneError, RunRecord

VALUES: dict[str, Any] = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "runs/x"}
A_RUN = "load_config: config has to be text or a Path or a mapping or a RunConfig, got 5"

MISTAKES: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (expertune.RunConfig, (), {}, "RunConfig: model is missing; add it"),
    (expertune.RunConfig, (), VALUES | {"lora": {"rank": 8}}, "RunConfig: unknown key lora.rank; did you mean r?"),
    (setattr, (expertune.RunConfig(**VALUES), "model", "x"), {}, "RunConfig: model cannot be set"),
    (setattr, (expertune.RunConfig(**VALUES).data, "train", "x"), {}, "another with expertune.load_config(config,"),
    (expertune.load_config, (5,), {}, A_RUN),
    (expertune.load_config, ({},), {}, "config: model is missing; add it"),
    (expertune.load_config, (), {}, "load_config: missing a required argument: 'config'"),
    (expertune.load_config, (VALUES, "lora.r=4"), {}, "overrides has to be a list of text, got 'lora.r=4'"),
    (expertune.load_config, (VALUES,), {"overides": []}, "no argument is called overides; did you mean overrides?"),
    (expertune.plan, (5,), {}, "plan: config has to be text or a Path or a mapping or a RunConfig, got 5"),
    (expertune.make_plan, (VALUES,), {}, "make_plan: config has to be a RunConfig, got {'model': 'm',"),
    (expertune.plan, (VALUES,), {"gpu": 5}, "plan: gpu has to be text or None, got 5"),
    (expertune.finetune, (VALUES,), {"resume": "yes"}, "finetune: resume has to be True or False, got 'yes'"),
    (expertune.finetune, (VALUES,), {"console": 5}, "finetune: console has to be Console or None, got 5"),
    (expertune.open_run, (5,), {}, "open_run: run_dir has to be text or a Path, got 5"),
    (expertune.open_run, ("x",), {"adapter": 50}, "open_run: adapter has to be text or None, got 50"),
    (expertune.RunRecord.load, (5,), {}, "RunRecord.load: output_dir has to be text or a Path, got 5"),
    (expertune.RunRecord.load, ("x", "../y/record.json"), {}, "name: '../y/record.json' is a path"),
    (
        expertune.evaluate,
        (RunRecord.start("x"),),
        {},
        "evaluate: run has to be Run or text or a Path, got an object",
    ),
    (expertune.evaluate, ("x",), {"rows": 0}, "evaluate: rows has to be a whole number above 0 or None, got 0"),
    (expertune.evaluate, ("x",), {"rows": True}, "evaluate: rows has to be a whole number above 0 or None, got True"),
    (expertune.generate, ("x", [5]), {}, "prompt has to be text or a mapping or a list of text or a mapping, got [5]"),
    (expertune.generate, ("x", " "), {}, "the prompt holds no text; write one"),
    (expertune.generate, ("x", ["y", ""]), {}, "prompt 2 holds no text; write one"),
    (expertune.generate, ("x", "y"), {"temperature": -1}, "temperature is -1; it must be 0"),
    (expertune.generate, ("x", "y"), {"temperature": "hot"}, "temperature has to be a number or None, got 'hot'"),
    (expertune.answers, ("x", "y"), {}, "answers: prompts has to be a list of text or a mapping, got 'y'"),
    (expertune.answers, ("x", ["y"], 5, True), {"compare": True}, "leave out base_only"),
    (expertune.chat, ("x",), {"batch_size": 2}, "chat: no argument is called batch_size"),
    (expertune.generate, ("x", "y", 0), {}, "generate: max_new_tokens has to be a whole number above 0, got 0"),
    (
        expertune.generate,
        ("x", "y"),
        {"max_tokens": 5},
        "called max_tokens; did you mean max_new_tokens?",
    ),
    (expertune.generate, ("x", "y"), {"zzz": True}, "no argument is called zzz; known: adapter, base_only"),
    (expertune.load_model, (5,), {}, "load_model: model has to be text or a Path, got 5"),
    (expertune.load_model, ("x",), {"dtype": "fp9"}, "dtype has to be one of auto, bfloat16, float16, float32"),
    (expertune.load_model, ("x",), {"dtype": torch.int8}, "or such a dtype of torch, got torch.int8"),
    (expertune.load_model, ("x",), {"device": "gpu"}, "device: torch has no 'gpu' here"),
    (expertune.attach, ("mixtral-nf4",), {}, "attach: model has to be a model from expertune.load_model"),
    (expertune.attach, ("mixtral-nf4",), {"rank": 8}, "attach: model has to be"),
    (expertune.load_adapter, (5, "x"), {}, "load_adapter: model has to be a model from expertune.load_model"),
    (expertune.quantize, (5, "x"), {}, "quantize: model has to be text or a Path, got 5"),
    (expertune.quantize, ("m", "x"), {"dtype": 16}, "quantize: dtype has to be text or a torch.dtype, got 16"),
    (
        expertune.quantize,
        ("m", "x"),
        {"double_quantization": "no"},
        "has to be True or False or None, got 'no'",
    ),
    (expertune.quantize, ("m", "x"), {"progress": 5}, "quantize: progress has to be a function or None, got 5"),
    (expertune.quantize, ("m", "x", False), {}, "takes 2 arguments without a name (model, out), got 3"),
    (expertune.quantize, ("m",), {}, "quantize: missing a required argument: 'out'"),
]


@pytest.mark.parametrize(("function", "positional", "named", "message"), MISTAKES)
def test_mistake_of_a_program_is_one_error_that_names_the_argument(
    function: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExpertuneError) as refused:
        function(*positional, **named)
    assert message in str(refused.value)


def test_run_file_may_be_a_mapping_with_paths_and_take_overrides() -> None:
    values = {"model": Path("m"), "data": {"train": [Path("a.jsonl"), "b.jsonl"]}, "output_dir": Path("runs") / "x"}
    config = expertune.load_config(values, ["lora.r=4"])
    assert (config.model, config.data.train, config.output_dir) == ("m", ["a.jsonl", "b.jsonl"], "runs/x")
    assert expertune.load_config(config) is config
    again = expertune.load_config(config, ["lora.dropout=0.1"])
    assert (again.lora.r, again.lora.dropout, config.lora.dropout) == (4, 0.1, 0.0)
    assert values["data"] == {"train": [Path("a.jsonl"), "b.jsonl"]}


def test_config_and_record_show_themselves_in_a_line_without_secrets() -> None:
    config = expertune.RunConfig(**VALUES, training={"max_steps": 3, "hub_token": "hf_secret"})
    assert repr(config) == (
        "RunConfig(model='m', data={'train': 'rows.jsonl'}, training={'max_steps': 3}, output_dir='runs/x')"
    )
    record = RunRecord.start("runs/x")
    assert repr(record) == "RunRecord('runs/x/record.json', not started)"
    record.values["run"] = {"status": "finished"}
    assert repr(record) == "RunRecord('runs/x/record.json', finished)"


def test_names_that_python_shows_of_the_package_are_the_public_ones() -> None:
    assert dir(expertune) == sorted([*expertune.__all__, "__version__"])


def test_error_in_a_notebook_is_its_message_alone() -> None:
    assert ExpertuneError("run.yaml: none")._render_traceback_() == ["ExpertuneError: run.yaml: none"]
