"""Tasks of lm-evaluation-harness on a run's live model; nothing here goes online."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'expertune[eval]'")

import lm_eval.utils
import torch
from typer.testing import CliRunner

import expertune
from expertune.cli import app
from expertune.config import parse_config
from expertune.errors import ConfigError, DoesNotFitError
from expertune.evaluation.harness import Harness
from expertune.evaluation.harness_tasks import TaskFiles
from tests.pages import ROOT, blocks
from tests.train.scarce import Scarce, outside_training

ASSETS = Path(__file__).parents[2] / "src" / "expertune" / "assets"
VIGGO = ASSETS / "viggo" / "viggo-valid.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> expertune.Run:
    """The embedded Mixtral after it has learned two examples by heart, more or less."""
    data = {"train": f"{VIGGO}[0:2]", "eval": f"{VIGGO}[0:2]", "template": "viggo"}
    values = {
        "model": str(ASSETS / "tiny-mixtral"),
        "data": data | {"columns": {"prompt": "ref", "completion": "mr"}},
        "memory_budget": "4GB",
        "quantization": {"compute_dtype": "float32"},
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["attention", "experts", "lm_head"]},
        "training": {"per_device_train_batch_size": 2, "max_steps": 15, "learning_rate": 5e-3, "eval_strategy": "no"},
        "task": {"metric": "slot-f1", "rows": 2, "max_new_tokens": 96, "batch_size": 2},
        "output_dir": str(tmp_path_factory.mktemp("harness") / "run"),
    }
    return expertune.finetune(parse_config(values))


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., Path]:
    """Write a task file that asks for sums, with some keys changed, beside its data; returns the folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{n} + {n} =", "right": str(2 * n)} for n in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def write(name: str = "sums", text: str = "", **changed: Any) -> Path:
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{right}}",
            "doc_to_choice": "['0', '2', '4', '6']",
            **changed,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(content) + text, encoding="utf-8")
        return folder

    return write


def test_shipped_task_gives_the_figures_of_the_runs_own_metric_with_and_without_the_adapter(run: expertune.Run) -> None:
    found = expertune.evaluate(run, tasks="viggo", rows=2)["tasks"]["viggo"]
    assert list(found) == ["none", "adapter"]
    for which, score in found.items():
        own = expertune.evaluate(run, rows=2, base_only=which == "none")["task"]
        assert {name: figure["value"] for name, figure in score["figures"].items()} == {
            "slot_f1": own["slot_f1"],
            "exact_match": own["exact_match"],
        }
        assert (score["examples"], score["shots"], score["harness"]) == (2, 0, lm_eval.__version__)
    assert found["adapter"]["figures"]["slot_f1"]["value"] > 0.5 > found["none"]["figures"]["slot_f1"]["value"]
    assert expertune.RunRecord.load(run.output_dir)["tasks"] == run.record["tasks"] == {"viggo": found}
    card = (run.output_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    scores = [f"{found[which]['figures']['slot_f1']['value']:.4f}" for which in ("none", "adapter")]
    assert f"| viggo: slot_f1, 0 shots, 2 examples | {scores[0]} | {scores[1]} |" in card


def test_a_tasks_answers_leave_tokenizer_seed_and_templates_of_the_process_as_they_were(run: expertune.Run) -> None:
    pad, state, templates = run.tokenizer.pad_token, torch.random.get_rng_state(), lm_eval.utils.env
    expertune.evaluate(run, tasks=["viggo"], rows=1, base_only=True)
    assert run.tokenizer.pad_token == pad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lm_eval.utils.env is templates


def test_task_file_of_ones_own_is_scored_beside_the_shipped_one(run: expertune.Run, tasks: Callable[..., Path]) -> None:
    found = expertune.evaluate(run, tasks=["sums", "viggo"], rows=2, include_path=tasks())["tasks"]
    assert set(found) == {"sums", "viggo"}
    accuracy = found["sums"]["adapter"]["figures"]["acc"]
    assert accuracy["value"] in (0.0, 0.5, 1.0)
    assert accuracy["stderr"] is not None
    recorded = expertune.RunRecord.load(run.output_dir)["tasks"]
    assert recorded["sums"] == found["sums"]


def test_task_file_of_the_commands_page_asks_what_the_page_says(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "docs" / "guides" / "commands.md", "yaml"))
    (tmp_path / "sums.yaml").write_text(block.text, encoding="utf-8")
    (tmp_path / "sums.jsonl").write_text(block.text.split(" # ")[1].splitlines()[0], encoding="utf-8")
    with TaskFiles(["sums"], include_path=tmp_path).loaded() as loaded:
        task = loaded["tasks"]["sums"]
        (example,) = task.test_docs()
        assert (task.doc_to_text(example), task.doc_to_target(example)) == ("1 + 1 =", "2")


def test_command_prints_base_and_adapter_side_by_side(run: expertune.Run, tasks: Callable[..., Path]) -> None:
    arguments = ["evaluate", str(run.output_dir), "--tasks", "sums", "--include-path", str(tasks()), "--rows", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["task", "figure", "base", "adapter", "examples"]
    assert lines[1][:2] == ["sums", "acc"]
    assert lines[1][-1] == "2"


def test_memory_that_runs_out_has_the_tasks_run_again_with_smaller_batches_and_then_ends_in_one_error(
    run: expertune.Run, tasks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def scores() -> dict[str, Any]:
        return Harness(run.model, run.tokenizer, TaskFiles(["sums"], tasks), 2, notes.append).scores(2)

    tasks = tasks()
    plenty = Scarce(10**9, when=outside_training).install(monkeypatch)
    expected = scores()
    monkeypatch.undo()
    assert notes == []
    Scarce(plenty.most_seen - 1, when=outside_training).install(monkeypatch)
    assert scores() == expected
    monkeypatch.undo()
    again = "tasks: memory ran out (Tried to allocate 2.00 GiB); again with"
    assert notes == [f"{again} 1 example a batch"]
    Scarce(0, when=outside_training).install(monkeypatch)
    with pytest.raises(DoesNotFitError, match=r"^tasks: memory does not suffice for one example at a time \(Tried to"):
        scores()
    assert notes == [f"{again} 1 example a batch"] * 2


@pytest.mark.parametrize(
    ("changed", "text", "why"),
    [
        ({}, "\n# a comment after JSON is YAML\n", None),
        (
            {"metric_list": [{"metric": "../evil"}]},
            "",
            "the metric ../evil is none of the harness, which would load it",
        ),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "", "the metric acc is none of the harness"),
        ({"dataset_path": "pandas"}, "", "dataset_path pandas may read pickles"),
        ({"generation_kwargs": {"custom_generate": "./x"}}, "", r"custom_generate \./x loads a Python script"),
        ({"use_prompt": "promptsource:x"}, "", "use_prompt promptsource:x takes its prompt from another library"),
    ],
)
def test_task_folder_that_names_code_is_refused_unless_it_is_asked_for(
    tasks: Callable[..., Path], changed: dict[str, Any], text: str, why: str | None
) -> None:
    folder = tasks(text=text, **changed)
    if why is None:
        TaskFiles(["sums"], folder)
        return
    with pytest.raises(ConfigError, match=rf"sums\.yaml: {why}.*; read it first, and then give --task-code"):
        TaskFiles(["sums"], folder)


def test_python_that_a_task_file_or_one_that_it_includes_names_runs_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\ndef target(doc): return 'x'\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "inner.yml").write_text("doc_to_target: !function helper.target\n")
    (tmp_path / "outer.yaml").write_text(
        "include: inner.yml\ntask: outer\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\n"
    )
    with pytest.raises(
        ConfigError, match=r"outer\.yaml: it runs Python, `!function helper\.target` \(by .*inner\.yml\)"
    ):
        TaskFiles(["outer"], tmp_path)
    assert not (tmp_path / "it-ran").exists()
    with TaskFiles(["outer"], tmp_path, task_code=True).loaded() as loaded:
        assert list(loaded["tasks"]) == ["outer"]
    assert (tmp_path / "it-ran").exists()


def test_template_that_reaches_for_python_is_stopped(tasks: Callable[..., Path]) -> None:
    folder = tasks(doc_to_text="{{ cycler.__init__.__globals__.os.getcwd() }}")
    with (
        pytest.raises(ConfigError, match=r"tasks: sums cannot be prepared \(SecurityError"),
        TaskFiles(["sums"], folder).loaded(),
    ):
        pass


def test_what_is_not_on_this_machine_is_fetched_only_when_asked_for(tasks: Callable[..., Path]) -> None:
    folder = tasks(dataset_path="owner/sums", dataset_kwargs=None)
    with pytest.raises(ConfigError, match=r"task sums reads the dataset owner/sums of the hub; give --download"):
        TaskFiles(["sums"], folder)
    TaskFiles(["sums"], folder, download=True)
    folder = tasks(dataset_kwargs={"data_files": ["https://example.org/sums.jsonl"]})
    with pytest.raises(ConfigError, match=r"task sums reads https://example\.org/sums\.jsonl; give --download"):
        TaskFiles(["sums"], folder)


def test_mistakes_in_tasks_are_one_error_each(tasks: Callable[..., Path], tmp_path: Path, run: expertune.Run) -> None:
    folder = tasks(dataset_kwargs={"data_files": {"test": "products.jsonl"}})
    with pytest.raises(ConfigError, match=r"task sums: there is no data file products\.jsonl, neither in .*tasks nor"):
        TaskFiles(["sums"], folder)
    with pytest.raises(
        ConfigError, match=r"include_path: .*nowhere is no folder; give the one that holds the task files"
    ):
        TaskFiles(["sums"], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="tasks: no task is named"):
        TaskFiles([], folder)
    with pytest.raises(ConfigError, match=r"include_path: of use with --tasks NAME"):
        expertune.evaluate(run, include_path=folder)
    with (
        pytest.raises(ConfigError, match=r"tasks: sums cannot be prepared \(UndefinedError: 'answer' is undefined\)"),
        TaskFiles(["sums"], tasks(doc_to_text="{{answer}}")).loaded(),
    ):
        pass


def test_unknown_task_is_named_with_the_nearest_and_with_files_that_cannot_be_read(
    tasks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tasks()
    (folder / "broken.yaml").write_text("task: [", encoding="utf-8")
    monkeypatch.setattr("lm_eval.tasks.__file__", str(folder / "__init__.py"))  # not all 14,000 files
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    with pytest.raises(ConfigError, match=r"tasks: no task is called viggi \(.*broken\.yaml.*\); did you mean viggo\?"):
        TaskFiles(["viggi"], folder)
    with pytest.raises(ConfigError, match=r"tasks: no task is called qwertz .*; `lm-eval ls tasks` lists those of"):
        TaskFiles(["qwertz"], folder)
