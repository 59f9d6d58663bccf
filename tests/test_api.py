"""The corridor as Python: a finished run can be opened, scored and asked."""

import copy
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import expertune
from expertune.cli import app
from expertune.config import parse_config
from expertune.data import Questions
from expertune.errors import CheckpointError, ConfigError, DataError, ExpertuneError
from expertune.generation.decoding import Completion
from expertune.run import answering
from tests.families.build import tiny_config
from tests.tiny_models import save_random, save_tiny_model
from tests.train.conftest import nine_steps, rows_file, run_values, small_mixtral, write_small_mixtral

ROOT = Path(__file__).parents[1]

# Sections whose keys are those of the run file, or names of packages.
OPEN = {"format_version", "config", "versions"}

__all__ = ["rows_file", "run_values", "small_mixtral"]  # fixtures


@pytest.fixture(scope="module")
def trained(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> expertune.Run:
    """A run of three steps; tests must not change its directory."""
    values = nine_steps(small_mixtral, rows_file, tmp_path_factory.mktemp("finished") / "run")
    values["task"] = {"metric": "exact-match", "rows": 2, "max_new_tokens": 4}
    values["training"] |= {"max_steps": 3, "gradient_checkpointing": True}
    del values["data"]["template"]
    with (Path(values["output_dir"]).parent / "console.txt").open("w", encoding="utf-8") as file:
        return expertune.finetune(parse_config(values), console=Console(file=file, width=60))


@pytest.fixture(scope="module")
def finished(trained: expertune.Run) -> Path:
    return trained.output_dir


@pytest.fixture(scope="module")
def evaluated(finished: Path) -> dict[str, Any]:
    """What `evaluate` gives for its directory."""
    return expertune.evaluate(finished)


def test_model_of_a_run_is_the_trained_one_and_the_one_that_is_loaded_again(
    trained: expertune.Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 15)[None]
    live = trained.model
    assert live is trained.model
    assert not live.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in live.modules())
    with torch.no_grad():
        logits = live(ids).logits
        trained.close()
        loaded = trained.model
        assert loaded is not live
        assert torch.equal(loaded(ids).logits, logits)
        assert torch.equal(expertune.open_run(finished).model(ids).logits, logits)


def test_model_of_a_run_in_mixed_precision_is_without_the_trainers_autocast(run_values: dict[str, Any]) -> None:
    run_values["training"] |= {"max_steps": 1, "bf16": True}
    run = expertune.finetune(parse_config(run_values))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = run.model(ids).logits
        assert torch.equal(logits, expertune.open_run(run.output_dir).model(ids).logits)
    assert logits.dtype == torch.float32


def test_run_object_takes_the_place_of_its_directory_and_of_no_other_adapter(
    trained: expertune.Run, finished: Path, evaluated: dict[str, Any]
) -> None:
    assert expertune.evaluate(trained)["loss"] == evaluated["loss"]
    question = {"prompt": "What is 1 plus 2?"}
    assert expertune.generate(trained, question, 4) == expertune.generate(finished, question["prompt"], 4)
    with pytest.raises(ConfigError, match=r"adapter: Run\('.*', finished\) is made already; give its directory"):
        expertune.generate(trained, "Who?", adapter="checkpoint-3")


def test_run_shows_in_a_notebook_what_came_out_and_where_its_report_is(trained: expertune.Run) -> None:
    shown = trained._repr_html_()
    after = trained.record["eval"]["after"]
    assert f'<td class="number">-</td><td class="number strong">{after:.3f}</td>' in shown
    assert "<svg" in shown
    assert f"{trained.output_dir}/report.html" in shown


def test_opened_run_gives_the_evaluation_loss_that_training_recorded(finished: Path, evaluated: dict[str, Any]) -> None:
    recorded = expertune.RunRecord.load(finished)["eval"]["loss"][-1]
    assert recorded[0] == 3
    assert evaluated["loss"] == pytest.approx(recorded[1], abs=1e-5)
    assert evaluated["task"]["rows"] == 2


def test_same_adapter_gets_the_same_score_twice_on_a_cpu(finished: Path, evaluated: dict[str, Any]) -> None:
    first, second = copy.deepcopy(evaluated), expertune.evaluate(finished)
    for result in (first, second):
        del result["task"]["seconds"]
    assert first == second


def test_earlier_checkpoint_and_base_score_otherwise_than_the_adapter(
    finished: Path, evaluated: dict[str, Any]
) -> None:
    tuned = evaluated["loss"]
    base = expertune.evaluate(finished, base_only=True)["loss"]
    assert expertune.evaluate(finished, adapter="checkpoint-3")["loss"] == tuned
    assert base > tuned


def test_generate_answers_through_the_runs_template(finished: Path) -> None:
    answer = expertune.generate(finished, "What is 1 plus 2?", max_new_tokens=4)
    assert isinstance(answer, str)
    assert answer == expertune.generate(finished, "What is 1 plus 2?", max_new_tokens=4)


def test_generate_answers_without_white_space_around(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completion = Completion(" Valletta.\n", 3, "stop", 0.1)
    monkeypatch.setattr(answering, "complete", lambda *_, **__: [completion])
    assert expertune.generate(finished, "What is the capital of Malta?") == "Valletta."


def test_generate_without_a_column_that_the_template_needs_says_what_a_prompt_is(trained: expertune.Run) -> None:
    with pytest.raises(DataError, match=r"the prompt: column prompt is missing; the question has foo; give an exampl"):
        expertune.generate(trained, {"foo": "Who?"})


def test_several_prompts_are_answered_as_each_alone_would_be_with_and_without_the_adapter(
    trained: expertune.Run,
) -> None:
    prompts = ["What is 1 plus 2?", {"prompt": "What is 3 plus 4? " * 9}, "Why?"]
    context = trained.model.config.max_position_embeddings
    try:
        longest = len(Questions(trained.data, trained.tokenizer).encode(prompts[1]))
        trained.model.config.max_position_embeddings = longest + 3
        found = list(expertune.answers(trained, prompts, 6, compare=True, batch_size=2))
        alone = [
            next(iter(expertune.answers(trained, [prompt], 6, base_only)))
            for prompt in prompts
            for base_only in (True, False)
        ]
    finally:
        trained.model.config.max_position_embeddings = context
    assert [each.adapter for each in found] == ["none", "adapter"] * 3
    assert [each.prompt for each in found] == [prompt for prompt in prompts for _ in range(2)]
    # The long prompt leaves less room, and takes none from those beside it.
    for one, other in zip(found, alone, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    assert "context" in {each.finish_reason for each in found[2:4]} <= {"context", "stop"}
    assert "context" not in {each.finish_reason for each in found[:2] + found[4:]}
    texts = [each.completion for each in found[1::2]]
    assert expertune.generate(trained, ["What is 1 plus 2?", "Why?"], 6) == [texts[0], texts[2]]


def test_chat_asks_the_run(trained: expertune.Run) -> None:
    conversation = expertune.chat(trained, 4)
    assert conversation.ask("What is 1 plus 2?") == expertune.generate(trained, "What is 1 plus 2?", 4)
    conversation.base_only = True
    assert conversation.ask("What is 1 plus 2?") == expertune.generate(trained, "What is 1 plus 2?", 4, base_only=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"promt": "a"}},
            "column promt: no prompt of this run has it, .*; did you mean prompt",
        ),
        ({"columns": {"prompt": "a"}}, "column prompt is the prompt itself; give one of the two"),
        ({"system": " "}, "system: the system prompt holds no text; write one, or leave it out"),
        ({"places": ["q.txt: row 7"]}, r"q\.txt: row 7 has \d+ tokens, but the model's context holds \d+; shorten it"),
    ],
)
def test_what_a_run_cannot_be_asked_is_told_before_its_model_is_loaded(
    options: dict[str, Any], message: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(answering, "load_run")
    prompt = "word " * 5000 if "places" in options else "Who?"
    with pytest.raises((ConfigError, DataError), match=message):
        expertune.answers(finished, [prompt], **options)
    if "places" not in options:
        with pytest.raises(ConfigError, match=r"holds no text|column pro?mp?t"):
            expertune.chat(finished, **options)


def test_commands_answer_as_python_does(finished: Path, trained: expertune.Run, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "What is 1 plus 2?"}\n{"prompt": "Why?"}\n', encoding="utf-8")
    command = ["generate", str(finished), "--prompt-file", str(tmp_path / "q.jsonl"), "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, [*command, "--compare", "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    tuned = expertune.generate(trained, ["What is 1 plus 2?", "Why?"], 3)
    base = expertune.generate(trained, ["What is 1 plus 2?", "Why?"], 3, base_only=True)
    assert [line["tuned"]["completion"] for line in lines] == tuned
    assert [line["base"]["completion"] for line in lines] == base
    chat = CliRunner().invoke(app, ["chat", str(finished), "--max-new-tokens", "3"], input="Why?\n/base\nWhy?\n")
    assert [line.strip() for line in chat.stdout.splitlines()] == [tuned[1], base[1]]


def test_columns_of_prompts_that_the_template_does_not_use_are_named(
    trained: expertune.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(type(trained.context), "notify", lambda _, line: told.append(line))
    expertune.answers(trained, [{"prompt": "Who?", "completion": "Ada", "n": 1}, {"prompt": "Why?", "id": 2}], 1)
    assert [line.rpartition(" columns ")[2] for line in told] == ["n, id"]


def test_run_whose_metric_is_not_registered_here_answers_and_gives_its_loss(
    finished: Path, evaluated: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = expertune.RunRecord.load(run)
    record["config"]["task"]["metric"] = "my-metric"
    record.save()
    opened = expertune.open_run(run)
    assert isinstance(expertune.generate(opened, "What is 1 plus 2?", max_new_tokens=4), str)
    scores = expertune.evaluate(opened)
    assert scores["loss"] == evaluated["loss"]
    assert "task" not in scores
    assert (
        "task.metric: my-metric is not registered in this process, and only the loss is taken"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match=r"task\.metric: no metric of this name is registered, got 'my-metric'"):
        expertune.load_config(run, ["output_dir=elsewhere"])


@pytest.mark.parametrize("command", [["evaluate"], ["chat"], ["generate", "--prompt", "Who?"]])
def test_file_in_the_place_of_a_run_directory_is_named(finished: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, str(finished / "record.json")])
    assert result.exit_code == 2
    assert f"{finished / 'record.json'}: a file; give the run directory" in result.stderr


def test_every_key_of_a_finished_runs_record_is_in_the_reference(trained: expertune.Run) -> None:
    pages = {
        name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("reference/record.md", "guides/plan.md")
    }
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", pages["reference/record.md"], re.DOTALL | re.MULTILINE))
    sections["plan"] += pages["guides/plan.md"]
    recorded = {(section, key) for section in trained.record.values.keys() - OPEN for key in trained.record[section]}
    recorded |= {("data", key) for key in trained.record["data"]["train"]}
    assert {(section, key) for section, key in recorded if f"`{key}`" not in sections[section]} == set()
    assert {("kernels", "ran"), ("inputs", "rows"), ("run", "started"), ("preflight", "four_bit")} <= recorded


def test_task_is_scored_before_and_after_on_held_out_rows(finished: Path) -> None:
    task = expertune.RunRecord.load(finished)["task"]
    assert task["before"]["rows"] == task["after"]["rows"] == 2
    assert len(task["after"]["examples"]) == 2


def test_finished_run_says_and_records_that_stock_peft_loads_it(finished: Path) -> None:
    said = (finished.parent / "console.txt").read_text(encoding="utf-8")
    assert "(stock PEFT loads it)" in " ".join(said.split())
    assert expertune.RunRecord.load(finished)["adapter"]["stock_peft"] is True


def test_run_shows_what_it_trains_on_before_it_loads_the_model(finished: Path) -> None:
    said = (finished.parent / "console.txt").read_text(encoding="utf-8")
    shown, _, rest = said.partition("loaded with 4-bit experts")
    assert rest
    assert "template  question-answer, chosen for this layout" in shown
    assert "columns   used: prompt, completion; ignored: none" in shown
    assert "  | <s>Question: What is 0 plus 1?\n  | Answer:\u27e6 It is 1.</s>\u27e7\n" in shown
    assert "evaluation examples: " in shown


def test_run_that_was_recorded_with_another_template_is_used_with_it(
    finished: Path, evaluated: dict[str, Any], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    record = expertune.RunRecord.load(old)
    for part in ("train", "eval"):
        assert record["data"][part]["template"] == "question-answer"
        record["data"][part] = {**record["data"][part], "template": "plain"}
    record.save()
    run = expertune.open_run(old)
    assert Questions(run.data, run.tokenizer).render("What is 1 plus 2?") == "What is 1 plus 2?"
    assert expertune.evaluate(run)["loss"] != evaluated["loss"]


def test_opening_something_else_names_what_is_missing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is it a run directory"):
        expertune.open_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-7: no such adapter.*checkpoint-3"):
        expertune.open_run(finished, adapter="checkpoint-7")
    for path in ("../run/adapter", "checkpoint-3/", "..", "", str(finished / "adapter")):
        with pytest.raises(ConfigError, match=r"is no name of a checkpoint in .*; give one such as checkpoint-50"):
            expertune.evaluate(finished, adapter=path)


def test_run_whose_base_was_replaced_answers_only_when_asked_to(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = expertune.RunRecord.load(run)
    record["config"]["model"] = str(write_small_mixtral(tmp_path / "model", seed=1))
    record.save()
    with pytest.raises(CheckpointError, match=r"adapter: this adapter was trained on another base.*--other-base"):
        expertune.generate(run, "What is 1 plus 2?", max_new_tokens=4)
    with pytest.raises(CheckpointError, match="other weights"):
        expertune.evaluate(run)
    assert isinstance(expertune.generate(run, "What is 1 plus 2?", max_new_tokens=4, other_base=True), str)


def test_generate_over_a_damaged_model_folder_is_one_message_and_exit_code_2(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = expertune.RunRecord.load(run)
    model = Path(shutil.copytree(record["config"]["model"], tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "mixtral", "num_hidden_layers": 1000000000}', encoding="utf-8")
    record["config"]["model"] = str(model)
    record.save()
    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", "Who?"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{model}/config.json: num_hidden_layers is 1000000000" in result.stderr


def test_adapter_of_another_base_is_refused_before_the_rows_are_read(
    finished: Path, run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = run_values | {"lora": {"init_from": str(finished / "adapter")}}
    values |= {"model": str(write_small_mixtral(tmp_path / "model", seed=1)), "output_dir": str(tmp_path / "next")}
    with pytest.raises(CheckpointError, match="trained on another base model"):
        expertune.finetune(parse_config(values))
    assert not (tmp_path / "next").exists()


def test_adapter_of_one_run_is_the_start_of_the_next(
    finished: Path, run_values: dict[str, Any], tmp_path: Path
) -> None:
    lora = {"init_from": str(finished / "adapter"), "dropout": 0.0}
    training = run_values["training"] | {"max_steps": 1, "eval_on_start": True}
    data = run_values["data"] | {"template": "question-answer"}
    values = run_values | {"data": data, "lora": lora, "training": training, "output_dir": str(tmp_path / "next")}
    record = expertune.finetune(parse_config(values)).record
    before = expertune.RunRecord.load(finished)["eval"]["loss"][-1][1]
    assert record["eval"]["loss"][0] == [0, pytest.approx(before, abs=1e-5)]


def test_bad_data_stops_before_the_model_is_loaded(run_values: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n', encoding="utf-8")
    values = run_values | {"data": {"train": str(bad), "eval": str(bad)}}
    with pytest.raises(DataError, match=r"bad\.jsonl: row 1"):
        expertune.finetune(parse_config(values))
    assert not (tmp_path / "run").exists()


def test_run_says_before_it_loads_the_model_what_stock_peft_will_not_read(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    save_random(tmp_path / "model", tiny_config("inkling2_text"))
    written = io.StringIO()
    with pytest.raises(ExpertuneError, match="tokenizer"):
        expertune.finetune(
            parse_config(
                run_values | {"model": str(tmp_path / "model"), "lora": {"targets": ["attention", "experts"]}}
            ),
            console=Console(file=written, width=400),
        )
    assert "will not read all of it: PEFT loses the tensors of model.layers.1.self_attn.v_sconv" in written.getvalue()


@pytest.mark.parametrize("tied", [True, False])
def test_run_says_before_it_loads_the_model_that_a_tied_head_is_not_merged_as_it_stands(
    tied: bool, run_values: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    written = io.StringIO()
    with pytest.raises(ExpertuneError, match="tokenizer"):
        expertune.finetune(
            parse_config(run_values | {"model": str(tmp_path / "model"), "lora": {"targets": ["lm_head", "w1"]}}),
            console=Console(file=written, width=400),
        )
    assert ("lm_head shares its weight with this model's embedding" in written.getvalue()) == tied


def test_run_without_evaluation_rows_cannot_be_evaluated(run_values: dict[str, Any], rows_file: Path) -> None:
    training = run_values["training"] | {"max_steps": 1, "eval_strategy": "no"}
    values = run_values | {"data": {"train": str(rows_file)}, "training": training}
    with pytest.raises(ConfigError, match=r"no data\.eval, and so no examples"):
        expertune.evaluate(expertune.finetune(parse_config(values)).output_dir)
