"""A plan keeps a model's shapes and its examples' lengths: the next plan of them is the same to the byte."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertune.config import RunConfig
from expertune.planning import Plan, kept_files, reading, tokenized
from expertune.planning.devices import Machine
from expertune.planning.kept_files import libraries, of_folder
from expertune.planning.plan import plan_for
from expertune.planning.recall import may_recall, recall_lengths, recall_shapes
from expertune.planning.table import as_text
from tests.planning.conftest import FILES, TINY_MIXTRAL
from tests.tiny_models import save_tiny_model

VIGGO = TINY_MIXTRAL.parent / "viggo" / "viggo-valid.csv"
ANSWERED = {"task": {"metric": "slot-f1"}, "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 320}}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what plans keep, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "expertune" / "plans"


@pytest.fixture
def only_kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on no model is read and no example is tokenized."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("read again")

    def begin() -> None:
        monkeypatch.setattr(reading, "read_shapes", refuse)
        monkeypatch.setattr(tokenized, "tokenized_lengths", refuse)

    return begin


def planned(config: RunConfig, **machine: Any) -> Plan:
    return plan_for(config, Machine.of(config, **machine), read=recall_shapes)


def as_bytes(plan: Plan) -> tuple[str, str]:
    return json.dumps(plan.to_json()), as_text(plan)


@pytest.mark.parametrize("sections", [{}, ANSWERED, {"lora": {"targets": ["attention", "experts"], "use_dora": True}}])
@pytest.mark.parametrize("model", ["mixtral-8x7b-v0.1", "qwen3-30b-a3b", "deepseek-v2-lite"])
def test_a_plan_of_kept_shapes_is_the_same_to_the_byte(run_of, only_kept, model, sections):
    config = run_of(model, memory_budget="24GB", placement="auto", **sections)
    machines: list[dict[str, Any]] = [{"gpu": "h100"}, {"gpu": "h100", "devices": 8}, {"device": "cpu"}]
    anew = [as_bytes(plan_for(config, Machine.of(config, **machine))) for machine in machines]
    assert [as_bytes(planned(config, **machine)) for machine in machines] == anew
    only_kept()
    assert [as_bytes(planned(config, **machine)) for machine in machines] == anew


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe", "granitemoe", "minimax_m2"])
def test_a_checkpoint_with_weights_is_planned_the_same_from_what_is_kept(run_of, only_kept, tmp_path, family):
    config = run_of(save_tiny_model(tmp_path / "model", family), **ANSWERED)
    anew = as_bytes(planned(config, gpu="h100"))
    only_kept()
    assert as_bytes(planned(config, gpu="h100")) == anew


@pytest.mark.parametrize(
    "damage", ["", "{", '{"sha256": "0", "content": {}}', '{"sha256": "0", "content": "{}"}', "digit"]
)
def test_a_damaged_file_is_read_anew_and_written_again(run_of, kept, only_kept, damage):
    config = run_of("mixtral-8x7b-v0.1")
    anew = as_bytes(planned(config, gpu="h100"))
    (path,) = kept.glob("shapes-*")
    whole = path.read_text()
    path.write_text(whole.replace("4096", "4095", 1) if damage == "digit" else damage)
    assert as_bytes(planned(config, gpu="h100")) == anew
    assert path.read_text() == whole
    only_kept()
    assert as_bytes(planned(config, gpu="h100")) == anew


def test_a_changed_config_is_another_model(run_of, tmp_path):
    folder = shutil.copytree(FILES / "mixtral-8x7b-v0.1", tmp_path / "model")
    first = planned(run_of(folder), gpu="h100")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 16}))
    second = planned(run_of(folder), gpu="h100")
    assert second.parameters.total < 0.6 * first.parameters.total


def test_tensors_that_are_gone_are_missed_although_the_model_was_planned_before(run_of, tiny_mixtral):
    from safetensors.torch import load_file, save_file

    from expertune.errors import CheckpointError

    planned(run_of(tiny_mixtral), gpu="h100")
    tensors = load_file(tiny_mixtral / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tiny_mixtral / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        planned(run_of(tiny_mixtral), gpu="h100")


def test_a_hub_model_that_was_planned_without_a_connection_is_looked_at_once_there_is_one(
    run_of, kept, tmp_path, monkeypatch
):
    import huggingface_hub

    snapshot = shutil.copytree(FILES / "mixtral-8x7b-v0.1", tmp_path / "snapshots" / ("0" * 40))

    def no_connection(model, revision=None):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", no_connection)
    plan = planned(run_of("owner/name"), gpu="h100")
    assert "by the names in the index alone" in plan.notes[0]
    assert not list(kept.glob("shapes-*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_among_the_shards_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert of_folder(tmp_path, (".json",)) == [["config.json", None], ["model.safetensors", None]]


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"double_quantization": False}},
        {"quantization": {"compute_dtype": "float32"}},
        {"quantization": {"layers": {"q_proj": 16}}},
    ],
    ids=str,
)
def test_what_a_run_file_says_of_its_weights_is_planned_although_the_model_is_known(run_of, sections):
    known = planned(run_of("mixtral-8x7b-v0.1"), gpu="h100")
    config = run_of("mixtral-8x7b-v0.1", **sections)
    other = planned(config, gpu="h100")
    assert other.weights == plan_for(config, Machine.of(config, gpu="h100")).weights
    assert other.weights != known.weights


def test_models_with_code_of_their_own_and_programs_with_transformers_are_planned_anew(monkeypatch):
    assert not may_recall(trust_remote_code=False), "transformers is imported here"
    monkeypatch.delitem(sys.modules, "transformers")
    assert may_recall(trust_remote_code=False)
    assert not may_recall(trust_remote_code=True)


@pytest.mark.parametrize("editable", [False, True])
def test_a_library_counts_by_its_files_unless_it_is_edited_in_place(tmp_path, monkeypatch, editable):
    (tmp_path / "madeup").mkdir()
    (tmp_path / "madeup" / "__init__.py").touch()
    about = tmp_path / "madeup-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: madeup\nVersion: 1.0\n")
    (about / "RECORD").write_text("madeup/__init__.py,sha256=a,0\n")
    (about / "direct_url.json").write_text(json.dumps({"url": "file:///a", "dir_info": {"editable": editable}}))
    monkeypatch.syspath_prepend(tmp_path)
    found = libraries("madeup")
    assert (found is None) is editable
    if found is not None:
        (about / "RECORD").write_text("madeup/__init__.py,sha256=b,0\n")
        assert libraries("madeup") != found


def test_a_model_is_read_again_once_a_file_of_transformers_that_read_it_was_edited(run_of, kept, monkeypatch):
    config = run_of("mixtral-8x7b-v0.1")
    planned(config, gpu="h100")
    (path,) = kept.glob("shapes-*")
    assert "models/mixtral/modeling_mixtral.py" in path.read_text()
    whole, state = path.read_text(), kept_files._state
    monkeypatch.setattr(kept_files, "_state", lambda imported: f"{state(imported)} and one line more")
    planned(config, gpu="h100")
    assert path.read_text() != whole


def test_an_edited_file_has_another_state(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_files, "_root", lambda: tmp_path)
    (tmp_path / "modeling.py").write_text("size = 1")
    before = kept_files._state(["modeling.py"])
    assert kept_files._state(["modeling.py"]) == before
    (tmp_path / "modeling.py").write_text("size = 2")
    os.utime(tmp_path / "modeling.py", (0, 0))
    assert kept_files._state(["modeling.py"]) != before


def test_a_library_from_another_place_than_pips_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").touch()
    assert libraries("jinja2") is not None
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jinja2")
    assert libraries("jinja2") is None


def test_lengths_are_kept_until_data_template_or_tokenizer_change(run_of, kept, tmp_path, tiny_mixtral):
    rows, template = tmp_path / "rows.csv", tmp_path / "template.jinja"
    rows.write_text("".join(VIGGO.read_text().splitlines(keepends=True)[:20]))
    template.write_text("{{ prompt }} -> {{ completion }}")
    data = {"train": str(rows), "max_length": 64, "template": str(template), "format": "prompt-completion"}
    data |= {"columns": {"prompt": "ref", "completion": "mr"}}

    def count_after(change: Callable[[], object], **changes: Any) -> int:
        change()
        recall_lengths(run_of(tiny_mixtral, data=data | changes))
        return len(list(kept.glob("lengths-*")))

    tokenizer = tiny_mixtral / "tokenizer_config.json"
    assert count_after(lambda: None) == 1
    assert count_after(lambda: None) == 1
    assert count_after(lambda: template.write_text("{{ prompt }} => {{ completion }}")) == 2
    assert count_after(lambda: rows.write_text(rows.read_text() + rows.read_text().splitlines()[1] + "\n")) == 3
    assert count_after(lambda: tokenizer.write_text(tokenizer.read_text() + "\n")) == 4
    assert count_after(lambda: None, max_length=32) == 5


def test_kept_lengths_are_those_that_were_counted(run_of, only_kept):
    data = {"train": str(VIGGO), "eval": str(VIGGO), "max_length": 64, "format": "prompt-completion"}
    config = run_of(TINY_MIXTRAL, data=data | {"template": "viggo", "columns": {"prompt": "ref", "completion": "mr"}})
    anew = tokenized.tokenized_lengths(config)
    assert recall_lengths(config) == anew
    only_kept()
    assert recall_lengths(config) == anew
