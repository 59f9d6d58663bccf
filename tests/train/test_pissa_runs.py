"""`lora.init: pissa` in a run: it begins as the base, resumes to the bit, and leaves an ordinary adapter behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import expertune
from expertune.adapt import initial
from expertune.adapt.attach import attach
from expertune.adapt.files import read_adapter_settings
from expertune.adapt.initial import begin_at_components, write_first_factors
from expertune.adapt.live import LivePair
from expertune.checkpoint.quantize import quantize
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, PreflightError
from expertune.exporting.opening import open_source
from expertune.objectives.units import keeps_start
from expertune.planning import make_plan
from expertune.run.record import RunRecord
from tests.adapt.conftest import stock_peft
from tests.tiny_models import dequantized, load_tiny, stock_model
from tests.train.test_initial_runs import copy_of, trained, with_keys

FIRST, ADAPTER = "first_factors.safetensors", "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def begun(
    small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    from tests.train.conftest import nine_steps

    values = nine_steps(small_mixtral, rows_file, tmp_path_factory.mktemp("pissa") / "run")
    training = {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "eval_on_start": True}
    values = with_keys(values, lora={"init": "pissa"}, training=training)
    return trained(values), values


def test_a_resumed_run_leaves_the_same_bytes(begun: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, values = begun
    run_dir = copy_of(whole, tmp_path / "run", "adapter", "checkpoint-2")
    made = (run_dir / FIRST).stat().st_mtime_ns
    trained(values | {"output_dir": str(run_dir)}, resume=True)
    assert (run_dir / FIRST).stat().st_mtime_ns == made
    assert (run_dir / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    live = "checkpoint-2/adapter_live.tensors"
    assert (run_dir / live).read_bytes() == (whole / live).read_bytes()


def test_a_run_does_not_resume_from_other_first_factors(begun: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, values = begun
    run_dir = copy_of(whole, tmp_path / "run", "adapter")
    (run_dir / FIRST).write_bytes((run_dir / FIRST).read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"first_factors.safetensors: has changed, and the run began with it"):
        trained(values | {"output_dir": str(run_dir)}, resume=True)


def test_it_begins_as_the_base_and_an_opened_run_computes_what_was_trained(
    begun: tuple[Path, dict[str, Any]],
) -> None:
    whole, _ = begun
    record = RunRecord.load(whole)
    found = record["adapter"]["components"]
    assert found["experts"]["matrices"] == 24
    assert found["linears"]["matrices"] == 8
    assert 0 < found["experts"]["share"] < 1
    assert record["eval"]["before"] == record["eval"]["loss"][0][1]
    run = expertune.open_run(whole)
    assert expertune.evaluate(run)["loss"] == record["eval"]["after"] != record["eval"]["before"]
    assert expertune.evaluate(run, base_only=True)["loss"] == record["eval"]["before"]
    assert expertune.generate(run, "What is 1 plus 2?", max_new_tokens=3)


def test_adapters_of_a_run_are_ordinary_ones_wherever_they_are_used(
    begun: tuple[Path, dict[str, Any]], small_mixtral: Path, tmp_path: Path
) -> None:
    whole, _ = begun
    for name in ("adapter", "checkpoint-1"):
        settings = read_adapter_settings(whole / name)
        assert settings is not None
        assert (settings["r"], settings["alpha"], "init" in settings) == (8, 12, False)
    assert "4-bit base alone" not in (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    ids = torch.randint(3, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    run = expertune.open_run(whole)
    with torch.no_grad():
        expected, base = run.model(ids).logits, dequantized(load_tiny(small_mixtral), small_mixtral)
        plain = base(ids).logits
        theirs = stock_peft(base, whole / "adapter").eval()(ids).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, plain, atol=1e-3)
    # On 16 bits the same factors: nothing of an adapter that begins as the base is another one's there.
    assert open_source(whole).max_rank == open_source(whole, base="dequantized").max_rank == 8
    expertune.export(whole, "merged", out=tmp_path / "merged", verify=False)
    merged = stock_model(tmp_path / "merged")
    beside = stock_peft(stock_model(small_mixtral), whole / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_run_that_starts_from_its_adapter_goes_on_with_an_ordinary_one(
    begun: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = begun
    shutil.copytree(whole / "adapter", tmp_path / "alone")
    values = values | {"output_dir": str(tmp_path / "run"), "lora": {"init_from": str(tmp_path / "alone")}}
    values["training"] = values["training"] | {"max_steps": 1, "save_steps": 1, "eval_steps": 1}
    run = RunRecord.load(trained(values))
    assert run["eval"]["loss"][0][1] == RunRecord.load(whole)["eval"]["after"]
    assert not {"components", "init"} & run["adapter"].keys()
    assert open_source(tmp_path / "run").max_rank == 8


def test_an_nf4_folder_begins_with_the_same_factors(begun: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, values = begun
    quantize(values["model"], tmp_path / "nf4")
    values = values | {"model": str(tmp_path / "nf4"), "output_dir": str(tmp_path / "run")}
    values["training"] = values["training"] | {"max_steps": 1, "save_steps": 1, "eval_steps": 1}
    assert (trained(values) / FIRST).read_bytes() == (whole / FIRST).read_bytes()


def test_the_plan_counts_what_is_kept_and_what_is_computed_with(run_values: dict[str, Any]) -> None:
    plain = make_plan(parse_config(run_values))
    made = make_plan(parse_config(with_keys(run_values, lora={"init": "pissa"})))
    adapter = plain.memory.components["adapter"]
    assert made.memory.components["adapter"] == made.memory.components["first"] == adapter
    assert made.parameters == plain.parameters
    assert made.memory.phases["layer"]["working_set"] > plain.memory.phases["layer"]["working_set"]
    assert made.memory.phases["save"]["copies"] == 2 * plain.memory.phases["save"]["copies"]
    assert made.disk.checkpoint_bytes > plain.disk.checkpoint_bytes
    assert any("lora.init: 32 matrices are decomposed once" in note for note in made.notes)


@pytest.mark.parametrize("lora", [{"r": 6, "alpha": 21.0}, {"r": 6, "alpha": 21.0, "dtype": "bfloat16"}, {"r": 8}])
def test_the_plan_has_room_for_the_files(
    lora: dict[str, Any], run_values: dict[str, Any], small_mixtral: Path, tmp_path: Path
) -> None:
    config = parse_config(with_keys(run_values, lora={"init": "pissa", **lora}))
    made = make_plan(config)
    optimizer = made.memory.phases["update"]["optimizer"]
    model = attach(load_tiny(small_mixtral), config.lora, str(small_mixtral))
    begin_at_components(model.get_base_model(), model.names, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-2 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path))
    model.save_live_factors(tmp_path)
    written = sum(each.stat().st_size for each in tmp_path.iterdir() if each.suffix in (".safetensors", ".tensors"))
    assert written <= made.disk.checkpoint_bytes - optimizer < 1.6 * written
    write_first_factors(tmp_path / FIRST, model.get_base_model(), model.names)
    assert (tmp_path / FIRST).stat().st_size <= made.disk.adapter_bytes - (made.disk.checkpoint_bytes - optimizer)


def test_the_check_before_training_sees_the_factors_that_training_begins_with(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss(pair: LivePair) -> None:  # what is taken away is not what the adapter begins with
        assert pair.first is not None
        for first, factor in zip(pair.first, (pair.a, pair.b), strict=True):
            first.copy_(0.9 * factor)

    monkeypatch.setattr(initial, "_keep_first", miss)
    with pytest.raises(PreflightError, match="the adapter does not begin as the base model: logits differ by up to"):
        trained(with_keys(run_values, lora={"init": "pissa"}))


def test_preferences_compare_with_the_base_that_it_begins_as(run_values: dict[str, Any]) -> None:
    values = {key: value for key, value in run_values.items() if key != "training"} | {"objective": "dpo"}
    values["lora"] = {"r": 4, "targets": ["attention", "experts"], "init": "pissa"}
    assert not keeps_start(parse_config(values))


def test_several_processes_do_not_begin_with_components(run_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.init: pissa is made by one process alone, and 2 were asked for"):
        expertune.plan(with_keys(run_values, lora={"init": "pissa"}), devices=2, memory="8GB")
