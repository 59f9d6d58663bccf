"""One evaluation, one number; and which of them are before and after."""

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import expertune
from expertune import api, finetune
from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.evaluation.held_out import HeldOut
from expertune.evaluation.metrics import METRICS, metric
from expertune.report.figures import summary_figure
from expertune.run.record import RunRecord
from tests.train.conftest import nine_steps


def run(values: dict[str, Any], resume: bool = False, **training: Any) -> tuple[RunRecord, str]:
    """The record of a run, and what it said."""
    written = io.StringIO()
    config = parse_config(values | {"training": values["training"] | training})
    record = finetune(config, resume=resume, console=Console(file=written, width=1000)).record
    return record, written.getvalue()


@pytest.fixture(scope="module")
def routed(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose config adds the router's auxiliary loss to its own."""
    folder = tmp_path_factory.mktemp("models") / "routed"
    folder.mkdir()
    for file in small_mixtral.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"label_smoothing_factor": 0.2, "neftune_noise_alpha": 5.0},
        {"bf16": True, "per_device_eval_batch_size": 1, "dataloader_drop_last": True},
    ],
    ids=str,
)
def test_train_and_evaluate_give_one_number(
    training: dict[str, Any], routed: Path, rows_file: Path, tmp_path: Path
) -> None:
    values = nine_steps(routed, rows_file, tmp_path / "run")
    values["training"] |= {"max_steps": 1, "warmup_steps": 0, "eval_on_start": True}
    record, _ = run(values, **training)
    (_, before), (_, after) = record["eval"]["loss"]
    assert before != after
    opened = expertune.open_run(tmp_path / "run")
    assert expertune.evaluate(opened)["loss"] == after == record["eval"]["after"]
    assert expertune.evaluate(opened, base_only=True)["loss"] == before == record["eval"]["before"]


def test_what_a_run_or_an_evaluation_has_no_use_of_is_told(
    run_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = run(run_values | {"revision": "main"}, max_steps=1)
    assert f"revision: main decides nothing: {run_values['model']} is a folder" in said
    scores = expertune.evaluate(run_values["output_dir"], rows=3)
    assert scores.keys() == {"adapter", "loss", "recoveries"}
    assert "rows: 3 decides nothing: the run has no task.metric" in capsys.readouterr().err
    record = RunRecord.start(tmp_path / "without")
    record.add("config", data={"train": "rows.jsonl"})
    record.save()
    with pytest.raises(ConfigError, match=r"the run has no data\.eval, and so no examples to evaluate on"):
        expertune.evaluate(tmp_path / "without")  # in which no adapter is looked for


def test_train_evaluates_before_its_first_and_after_its_last_step_by_default(run_values: dict[str, Any]) -> None:
    for key in ("eval_strategy", "eval_steps"):
        del run_values["training"][key]
    record, said = run(run_values, max_steps=2)
    assert [step for step, _ in record["eval"]["loss"]] == [0, 2]
    assert [record["eval"]["before"], record["eval"]["after"]] == [loss for _, loss in record["eval"]["loss"]]
    state = json.loads((Path(run_values["output_dir"]) / "checkpoint-2" / "trainer_state.json").read_text("utf-8"))
    assert state["stateful_callbacks"]["History"]["attributes"]["eval_losses"] == record["eval"]["loss"]
    assert "step 0/2  evaluation loss" in said
    assert re.search(r"memory [\d.]+ GB  imbalance 1\.\d\d", said)
    for found in record["experts"]["evaluations"].values():
        assert [sum(tokens) for tokens in found["counts"].values()] == 2 * [2 * found["tokens"]]
    assert list(record["experts"]["evaluations"]) == ["0", "2"]
    page = (Path(run_values["output_dir"]) / "report.html").read_text("utf-8")
    assert "Experts that saw few tokens" in page


def test_readmes_own_rows_run_and_print_what_the_readme_says(
    small_mixtral: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Your own data")[1].split("## ")[0]
    run_file, program = (block.split("```")[0] for block in re.split(r"```(?:yaml|python)\n", section)[1:])
    run_file = run_file.replace("mistralai/Mixtral-8x7B-v0.1", str(small_mixtral))
    run_file = run_file.replace("rows.jsonl[0:900]", f"{rows_file}[0:20]")
    run_file = run_file.replace("rows.jsonl[900:1000]", f"{rows_file}[20:24]")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(run_file, encoding="utf-8")

    exec(program)  # the README's own words

    printed = capsys.readouterr().out.splitlines()
    steps = [step for step, _ in ast.literal_eval(printed[0])]
    assert steps == [0, 6]  # two passes over 20 rows, eight a step
    record = RunRecord.load("runs/first")
    assert record["eval"]["after"] < record["eval"]["before"]


def test_first_evaluation_after_some_steps_or_of_another_adapter_is_no_before(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    first, _ = run(run_values, max_steps=3)
    assert [step for step, _ in first["eval"]["loss"]] == [3]
    assert first["eval"]["before"] is None
    lora = {"init_from": str(tmp_path / "run" / "adapter"), "dropout": 0.0}
    values = run_values | {"lora": lora, "output_dir": str(tmp_path / "next")}
    further, _ = run(values, max_steps=1, eval_on_start=True)
    assert [step for step, _ in further["eval"]["loss"]] == [0, 1]
    assert further["eval"]["before"] is None
    assert further["eval"]["after"] == further["eval"]["loss"][-1][1]


def test_train_that_keeps_the_best_names_it_and_its_value_and_writes_that_adapter(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second of three evaluations is the best.
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(HeldOut, "metrics", lambda self, step: {"loss": next(losses)})
    record, said = run(run_values, load_best_model_at_end=True)
    run_dir = Path(run_values["output_dir"])
    assert (
        record["adapter"].items() >= {"step": 6, "checkpoint": "checkpoint-6", "metric": "loss", "value": 2.0}.items()
    )
    assert record["eval"]["after"] == 2.0
    assert "that of checkpoint-6, the best by loss (2.0000)" in said
    adapters = [
        run_dir / folder / "adapter_model.safetensors" for folder in ("adapter", "checkpoint-6", "checkpoint-9")
    ]
    written, best, last = (adapter.read_bytes() for adapter in adapters)
    assert written == best != last


def test_train_chooses_its_best_checkpoint_by_the_tasks_score(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_values | {"task": {"metric": "exact-match", "rows": 2, "max_new_tokens": 4}}
    shares = iter([0.0, 0.5, 1.0, 0.5, 1.0])  # of the base model, at steps 3, 6 and 9, of the adapter that was written
    score = {"metric": "exact-match", "rows": 2, "seconds": 0.1, "examples": []}
    monkeypatch.setattr(HeldOut, "score", lambda *_, **__: score | {"exact_match": next(shares)})
    training = {"metric_for_best_model": "eval_exact_match", "load_best_model_at_end": True}
    record, said = run(values, **training)
    assert record["eval"]["scores"] == [[3, {"exact_match": 0.5}], [6, {"exact_match": 1.0}], [9, {"exact_match": 0.5}]]
    assert (
        record["adapter"].items()
        >= {"step": 6, "checkpoint": "checkpoint-6", "metric": "exact_match", "value": 1.0}.items()
    )
    assert record["eval"]["after"] == dict(record["eval"]["loss"])[6]
    assert "exact_match 1.000" in said


def test_a_metric_registered_by_one_function_is_validated_recorded_shown_and_chooses_the_best_checkpoint(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "length-gap", METRICS["exact-match"])  # removed again with the test

    @metric("length-gap", label="difference in length", higher_is_better=False)
    def length_gap(expected: str, answered: str) -> float:
        return float(abs(len(expected.strip()) - len(answered.strip())))

    values = run_values | {"task": {"metric": "length-gap", "rows": 2, "max_new_tokens": 4}}
    with pytest.raises(ConfigError, match="did you mean length-gap"):
        parse_config(values | {"task": {"metric": "length-gab"}})
    record, said = run(values, max_steps=6, metric_for_best_model="length_gap", load_best_model_at_end=True)

    scores = {step: score["length_gap"] for step, score in record["eval"]["scores"]}
    assert record["adapter"]["value"] == min(scores.values()) < 100
    assert record["task"]["after"]["length_gap"] == scores[record["adapter"]["step"]]
    shown = f"length_gap {record['task']['after']['length_gap']:.3f}"
    assert f"after: {shown} on 2 evaluation examples" in said
    assert "difference in length" in said  # the summary's table
    labels = [label.get_text() for axes in summary_figure(record.values).axes for label in axes.get_xticklabels()]
    assert "difference in length" in labels
    assert expertune.evaluate(values["output_dir"])["task"]["length_gap"] == record["task"]["after"]["length_gap"]


@pytest.mark.parametrize("before", [True, False])
def test_the_base_model_is_scored_before_training_unless_the_run_file_says_no(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    score = {"metric": "exact-match", "rows": 2, "seconds": 0.1, "examples": [], "exact_match": 0.5}
    monkeypatch.setattr(HeldOut, "score", lambda *_, **__: score)
    task = {"metric": "exact-match", "rows": 2, "max_new_tokens": 4, "before": before}
    record, said = run(run_values | {"task": task}, max_steps=1)
    assert set(record["task"]) == ({"before", "after"} if before else {"after"})
    announced = "the base model answers 2 examples for exact-match; task.before: false leaves that out"
    assert (announced in " ".join(said.split())) is before
    assert "exact match" in said  # the summary's table has the score afterwards


def test_score_of_another_task_is_not_kept_as_before_when_a_run_is_resumed(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_values | {"task": {"metric": "exact-match", "rows": 2, "max_new_tokens": 4}}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(values)
    monkeypatch.undo()
    assert RunRecord.load(run_values["output_dir"])["task"]["before"]["rows"] == 2
    record, _ = run(values | {"task": values["task"] | {"rows": 3}}, resume=True, max_steps=9)
    assert record["task"]["before"]["rows"] == record["task"]["after"]["rows"] == 3
