"""What a training run does with the data, the loss, checkpoints and trackers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertune import finetune
from expertune.config import parse_config
from expertune.data import token_cache
from expertune.errors import ConfigError, NonFiniteLossError, StorageError
from expertune.layers.varlen_attention import sequence_lengths
from expertune.run.record import RunRecord
from expertune.train.arguments import training_arguments
from tests.train.scarce import adapter_bytes


def train(values: dict[str, Any], **training: Any) -> RunRecord:
    return finetune(parse_config(values | {"training": values["training"] | training})).record


def test_run_leaves_record_adapter_checkpoints_and_histogram(whole_run: Path) -> None:
    record, run_dir = RunRecord.load(whole_run), whole_run
    assert [step for step, _ in record["train"]["loss"]] == list(range(1, 10))
    assert [step for step, _ in record["eval"]["loss"]] == [3, 6, 9]
    assert record["train"]["loss"][-1][1] < record["train"]["loss"][0][1]
    assert record["throughput"]["tokens_per_second"] > 0
    assert record["memory"]["peak_bytes"] > 0
    assert record["preflight"]["passed"] is True
    assert len(record["data"]["train"]["sha256"]) == 1
    assert record["versions"]["torch"] == torch.__version__
    assert (run_dir / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert config["lora_dropout"] == 0


def test_run_on_mapped_examples_gives_the_bytes_and_the_record_of_one_in_memory(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_values | {"data": run_values["data"] | {"packing": "packed"}}
    held = train(values | {"output_dir": str(tmp_path / "held")}, max_steps=3, eval_steps=3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)
    mapped = train(values | {"output_dir": str(tmp_path / "mapped")}, max_steps=3, eval_steps=3)
    assert list((tmp_path / "cache" / "expertune" / "tokens").iterdir())
    assert (mapped["data"], mapped["inputs"]) == (held["data"], held["inputs"])
    assert (mapped["train"]["loss"], mapped["eval"]["loss"]) == (held["train"]["loss"], held["eval"]["loss"])
    assert adapter_bytes(tmp_path / "mapped") == adapter_bytes(tmp_path / "held")


@pytest.mark.parametrize(
    ("packing", "checkpointing"),
    [
        ("padding-free", False),
        ("packed", True),
        pytest.param("padding-free", True, marks=pytest.mark.slow),
        pytest.param("packed", False, marks=pytest.mark.slow),
    ],
)
def test_where_rows_begin_reaches_every_layer_of_every_step(
    packing: str, checkpointing: bool, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(position_ids: Tensor) -> list[int]:
        # The loss compares itself on a few tokens of one row, which are no batch of the collator.
        assert (position_ids == 0).sum() == 1
        return sequence_lengths(position_ids)

    monkeypatch.setattr("expertune.layers.varlen_attention.sequence_lengths", look)
    data = run_values["data"] | {"packing": packing}
    record = train(run_values | {"data": data}, gradient_checkpointing=checkpointing, max_steps=3)
    assert len(record["train"]["loss"]) == 3
    assert len(record["eval"]["loss"]) == 1
    assert all(math.isfinite(loss) for part in ("train", "eval") for _, loss in record[part]["loss"])


def test_padded_rows_give_the_loss_of_padding_free_rows(run_values: dict[str, Any], tmp_path: Path) -> None:
    values = run_values | {"lora": run_values["lora"] | {"dropout": 0.0}}
    values["training"] = values["training"] | {"max_steps": 4, "eval_steps": 4, "save_strategy": "no"}
    padded = values["data"] | {"packing": "padded"}
    one = train(values | {"data": padded, "output_dir": str(tmp_path / "padded")})
    other = train(values | {"output_dir": str(tmp_path / "free")})
    for part, steps in (("train", 4), ("eval", 1)):
        assert len(one[part]["loss"]) == steps
        for (_, left), (_, right) in zip(one[part]["loss"], other[part]["loss"], strict=True):
            assert left == pytest.approx(right, abs=1e-5)


def test_evaluation_loss_weighs_every_label_token_alike(run_values: dict[str, Any], three_steps: Path) -> None:
    by_row = train(run_values, max_steps=3, save_strategy="no", per_device_eval_batch_size=1)
    at_once = RunRecord.load(three_steps)  # by eight, of which there are four
    assert len(by_row["eval"]["loss"]) == 1
    for (_, one), (_, other) in zip(by_row["eval"]["loss"], at_once["eval"]["loss"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_evaluating_in_between_changes_nothing_of_what_is_learned(
    run_values: dict[str, Any], three_steps: Path
) -> None:
    assert run_values["lora"]["dropout"]
    looked_on = train(run_values, max_steps=3, save_strategy="no", eval_steps=1, eval_on_start=True)
    for record, evaluated in ((looked_on, [0, 1, 2, 3]), (RunRecord.load(three_steps), [3])):
        assert [step for step, _ in record["eval"]["loss"]] == evaluated
    assert adapter_bytes(Path(run_values["output_dir"])) == adapter_bytes(three_steps)


def test_loss_that_is_not_finite_stops_the_run_and_names_step_rows_and_checkpoint(run_values: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteLossError) as error:
        train(run_values, learning_rate=1e35, warmup_steps=0, save_steps=1, max_grad_norm=0)
    message = str(error.value)
    assert "in step " in message
    assert "rows.jsonl: row " in message
    assert "checkpoint-1" in message
    assert not (Path(run_values["output_dir"]) / "adapter").exists()
    record = RunRecord.load(run_values["output_dir"])
    assert record["run"]["status"] == "stopped"
    assert record["run"]["error"] == message


def test_only_as_many_checkpoints_stay_as_asked_for_and_the_best_is_one(run_values: dict[str, Any]) -> None:
    train(run_values, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss")
    run_dir = Path(run_values["output_dir"])
    kept = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    assert len(kept) == 2
    losses = dict(RunRecord.load(run_dir)["eval"]["loss"])
    best = min(losses, key=lambda step: losses[step])
    assert f"checkpoint-{best}" in kept
    state = json.loads((run_dir / kept[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    assert Path(state["best_model_checkpoint"]).parent == run_dir


@pytest.mark.parametrize(("alpha", "b_dtype"), [(8, torch.bfloat16), (6, torch.float32)])
def test_adapter_in_bfloat16_is_saved_in_bfloat16_where_its_scale_folds_exactly(
    alpha: int, b_dtype: torch.dtype, run_values: dict[str, Any]
) -> None:
    """At r 4: a scale of 2 moves the exponent alone; 1.5 needs one more bit than bfloat16 has."""
    train(run_values | {"lora": run_values["lora"] | {"dtype": "bfloat16", "alpha": alpha}}, max_steps=1)
    tensors = load_file(Path(run_values["output_dir"]) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_A." in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in tensors.items() if ".lora_B." in name} == {b_dtype}


def test_misspelt_training_argument_is_refused_with_the_nearest_name(run_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rat .*did you mean learning_rate"):
        train(run_values, learning_rat=1.0)


def test_paged_optimizer_on_a_cpu_is_replaced_and_said_once() -> None:
    args, notes = training_arguments({"optim": "paged_adamw_8bit"}, "unused", torch.device("cpu"))
    assert args.optim == "adamw_torch"
    assert len(notes) == 1
    assert "paged_adamw_8bit" in notes[0]


def test_training_keys_that_decide_nothing_are_each_told_and_kept_in_the_record(run_values: dict[str, Any]) -> None:
    unused = {
        "fp16": True,
        "hub_model_id": "me/mine",
        "include_for_metrics": ["loss"],
        "fp16_full_eval": True,
        "eval_do_concat_batches": False,
        "restore_callback_states_from_checkpoint": False,
        "use_cpu": False,
        "length_column_name": "size",
        "ddp_bucket_cap_mb": 25,
        "auto_find_batch_size": True,
    }
    used = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "do_train": True, "bf16": False}
    notes = train(run_values, **unused, **used)["train"]["notes"]
    told = {note.split(".")[1].split()[0].rstrip(":") for note in notes if note.startswith("training.")}
    assert told == set(unused)


def test_evaluations_that_are_asked_for_and_not_at_once_are_told() -> None:
    args, notes = training_arguments({"do_eval": False, "eval_strategy": "epoch"}, "unused", torch.device("cpu"))
    assert args.do_eval
    assert notes == ["training.do_eval: False is not used: training.eval_strategy asks for evaluations"]
    assert training_arguments({"do_eval": False}, "unused", torch.device("cpu"))[1] == []


def test_cpu_is_refused_by_key_where_the_model_is_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"training\.use_cpu is true, but the model is on the GPU"):
        training_arguments({"use_cpu": True}, "unused", torch.device("cuda", 0))


def test_strategy_that_yaml_reads_as_false_means_no() -> None:
    args, _ = training_arguments({"eval_strategy": False}, "unused", torch.device("cpu"))
    assert args.eval_strategy == "no"


def test_values_that_do_not_go_together_are_refused_before_the_model_is_loaded(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertune.run.inputs.fetch_model", None)  # nothing of the model may be touched
    with pytest.raises(ConfigError, match=r"training: transformers refuses a value: .*load_best_model_at_end"):
        train(run_values, load_best_model_at_end=True, save_strategy="epoch")
    assert not Path(run_values["output_dir"]).exists()


def test_run_for_which_the_disk_has_no_room_is_refused_before_the_model_is_loaded(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    monkeypatch.setattr("expertune.api.load_to_train", None)
    with pytest.raises(StorageError, match=r"the run will write .* 3 checkpoints of .* are free; make room"):
        train(run_values)
    assert RunRecord.load(run_values["output_dir"])["run"]["status"] == "stopped"
