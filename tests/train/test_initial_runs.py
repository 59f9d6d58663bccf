"""`lora.init` and `fit: calibrated` in a run: made once, kept in its directory, right where it is exported."""

import io
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expertune
from expertune import finetune
from expertune.adapt.factors import AdapterFactors
from expertune.adapt.files import read_adapter_settings
from expertune.checkpoint.moments import Moments
from expertune.checkpoint.quantize import quantize
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, DataError
from expertune.exporting.opening import open_source
from expertune.objectives.units import keeps_start
from expertune.planning import make_plan
from expertune.run.correction import require_first_factors
from expertune.run.record import RunRecord
from expertune.storage import hash_file

QERA = {"lora": {"init": "qera"}, "quantization": {"fit": "calibrated", "calibration_tokens": 300}}


def with_keys(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values.get(name, {}) | keys for name, keys in sections.items()}


def trained(values: dict[str, Any], resume: bool = False) -> Path:
    run = finetune(parse_config(values), resume=resume, console=Console(file=io.StringIO()))
    return run.output_dir


@pytest.fixture(scope="module")
def corrected(
    small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    from tests.train.conftest import nine_steps

    values = nine_steps(small_mixtral, rows_file, tmp_path_factory.mktemp("corrected") / "run")
    values = with_keys(values, training={"max_steps": 2, "save_steps": 1, "eval_steps": 2}, **QERA)
    return trained(values), values


def going_on(values: dict[str, Any], adapter: Path, output_dir: Path) -> dict[str, Any]:
    """The run file for one step that goes on from an adapter."""
    lora = {key: value for key, value in values["lora"].items() if key != "init"}
    values = values | {"output_dir": str(output_dir), "lora": lora | {"init_from": str(adapter)}}
    return with_keys(values, training={"max_steps": 1, "save_steps": 1, "eval_steps": 1})


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_the_factors_that_it_has(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    run_dir = copy_of(whole, tmp_path / "run", "adapter", "checkpoint-1", "checkpoint-2")
    made = [run_dir / "calibration.safetensors", run_dir / "initial_adapter" / "adapter_model.safetensors"]
    times = [path.stat().st_mtime_ns for path in made]
    trained(values | {"output_dir": str(run_dir)}, resume=True)
    assert [path.stat().st_mtime_ns for path in made] == times
    name = "adapter/adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole / name).read_bytes()


def copy_of(whole: Path, run_dir: Path, *without: str) -> Path:
    """The run as it was before it had some folders."""
    shutil.copytree(whole, run_dir)
    for late in without:
        shutil.rmtree(run_dir / late)
    record = RunRecord.load(run_dir)
    record.values["config"]["output_dir"] = str(run_dir)
    record.update("run", status="stopped")
    return run_dir


@pytest.mark.slow
def test_a_run_does_not_go_on_from_other_factors(corrected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, values = corrected
    run_dir = copy_of(whole, tmp_path / "run", "adapter")
    (run_dir / "initial_adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"initial_adapter.*is missing, and the run began with it"):
        trained(values | {"output_dir": str(run_dir)}, resume=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_live.tensors"])
def test_a_run_does_not_go_on_where_a_file_beside_its_first_factors_was_exchanged(
    name: str, corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    run_dir = copy_of(whole, tmp_path / "run", "adapter")
    path = run_dir / "initial_adapter" / name
    was_there = path.is_file()
    path.write_bytes((path.read_bytes() if was_there else b"") + b" ")
    problem = "has changed, and the run began with it" if was_there else "was not there when the run began"
    with pytest.raises(CheckpointError, match=rf"{name}: {problem}"):
        trained(values | {"output_dir": str(run_dir)}, resume=True)
    with pytest.raises(CheckpointError, match=rf"{name}: {problem}"):
        open_source(run_dir, adapter="checkpoint-1")


def test_the_record_says_what_was_corrected_and_an_opened_run_has_the_same_bytes(
    corrected: tuple[Path, dict[str, Any]],
) -> None:
    whole, _ = corrected
    record = RunRecord.load(whole)
    init = record["adapter"]["init"]
    assert init["how"] == "qera"
    for what in ("experts", "linears"):
        assert 0 < init[what]["error_after"] < init[what]["error_before"]
    assert record["model"]["base"]["fit"] == "calibrated"
    assert record["eval"]["before"] is None  # step 0 is not the base
    evaluated = expertune.evaluate(whole)
    assert evaluated["loss"] == pytest.approx(record["eval"]["loss"][-1][1], abs=1e-6)


def update_of(factors: AdapterFactors) -> dict[str, torch.Tensor]:
    found = {name: pair.scale * pair.b.float() @ pair.a.float() for name, pair in factors.linears.items()}
    for module, projections in factors.experts.items():
        for projection, pairs in projections.items():
            for expert, pair in enumerate(pairs):
                found[f"{module}.{expert}.{projection}"] = pair.scale * pair.b.float() @ pair.a.float()
    return found


def test_on_16_bits_what_it_learned_is_exported_and_on_4_bits_the_whole(
    corrected: tuple[Path, dict[str, Any]], small_mixtral: Path, tmp_path: Path
) -> None:
    whole, _ = corrected
    raw, learned = open_source(whole, base="dequantized"), open_source(whole)
    assert learned.max_rank == 2 * raw.max_rank
    from expertune.adapt.factors import read_factors
    from expertune.adapt.files import read_adapter

    first = read_adapter(whole / "initial_adapter")
    began = update_of(read_factors(first.config, first.tensors, raw.names, first.where))
    now, beyond = update_of(raw.factors), update_of(learned.factors)
    for name, update in beyond.items():
        torch.testing.assert_close(update, now[name] - began[name], rtol=1e-4, atol=1e-6)


def test_the_adapter_and_its_card_say_that_it_is_for_the_4_bit_base_alone(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, _ = corrected
    for folder in ("adapter", "checkpoint-1", "initial_adapter"):
        settings = read_adapter_settings(whole / folder)
        assert settings is not None
        assert settings["init"] == "qera"
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card.index("**For the 4-bit base alone.**") < card.index("Base:")
    assert "from_pretrained" not in card
    shutil.copytree(whole / "adapter", tmp_path / "adapter")
    require_first_factors(str(whole / "checkpoint-1"))
    with pytest.raises(CheckpointError, match=r"lora\.init: qera\), and what it began as is not at .*initial_adapter"):
        require_first_factors(str(tmp_path / "adapter"))


@pytest.mark.slow
def test_a_run_that_goes_on_from_it_keeps_its_first_factors(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    values = going_on(values, whole / "adapter", tmp_path / "run")
    said = io.StringIO()
    run = finetune(parse_config(values), console=Console(file=said, width=1000)).output_dir
    assert "holds a correction of 4 bits and is right on this run's 4-bit base alone" in said.getvalue()
    assert " --to peft" in said.getvalue()
    first = "initial_adapter/adapter_model.safetensors"
    assert (run / first).read_bytes() == (whole / first).read_bytes()
    settings = read_adapter_settings(run / "adapter")
    assert settings is not None
    assert settings["init"] == RunRecord.load(run)["adapter"]["init"]["how"] == "qera"
    assert open_source(run).max_rank == 2 * open_source(run, base="dequantized").max_rank
    # The same beginning, so that nothing of the first run's correction is exported twice.
    shutil.rmtree(run / "adapter")
    RunRecord.load(run).update("run", status="stopped")
    trained(values, resume=True)
    assert (run / first).read_bytes() == (whole / first).read_bytes()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_run_goes_on_from_an_adapter_whose_first_factors_are_not_those_of_its_record(
    name: str, corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    shutil.copytree(whole, tmp_path / "first")
    path = tmp_path / "first" / "initial_adapter" / name
    content = bytearray(path.read_bytes())
    if name.endswith(".json"):
        content += b" "
    else:
        content[-1] ^= 1  # a bit of a factor: still an adapter of the same settings
    path.write_bytes(content)
    adapter = tmp_path / "first" / "adapter"
    with pytest.raises(CheckpointError, match=rf"lora\.init_from: .*{name} is not what record.json says"):
        trained(going_on(values, adapter, tmp_path / "run"))
    assert not (tmp_path / "run" / "record.json").exists()
    (tmp_path / "first" / "record.json").unlink()  # without which nothing says what they were
    require_first_factors(str(adapter))


def test_a_run_on_an_nf4_folder_exports_for_16_bits_what_it_would_with_the_checkpoint_at_hand(
    corrected: tuple[Path, dict[str, Any]], small_mixtral: Path, tmp_path: Path
) -> None:
    whole, values = corrected
    nf4 = tmp_path / "nf4"
    expertune.quantize(small_mixtral, nf4, calibration=whole / "calibration.safetensors")
    values = going_on(values, whole / "adapter", tmp_path / "run") | {"model": str(nf4)}
    run = trained({key: value for key, value in values.items() if key != "quantization"})
    alone = expertune.export(run, "peft", out=tmp_path / "alone")
    beside = expertune.export(run, "peft", out=tmp_path / "beside", model=small_mixtral)
    name = "adapter_model.safetensors"
    found, expected = load_file(alone.folder / name), load_file(beside.folder / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    config = json.loads((alone.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(small_mixtral)
    for each, on in ((alone, "dequantized"), (beside, "source")):
        assert each.verification is not None
        assert each.verification["compared_on"] == on
        said = "has the values of the run's 4-bit weights" in (each.folder / "README.md").read_text(encoding="utf-8")
        assert said == (on == "dequantized")
    # On the 4-bit values themselves the correction belongs to it.
    assert open_source(run).max_rank == 2 * open_source(run, base="dequantized").max_rank


def test_without_a_source_in_16_bits_there_is_nothing_to_correct(
    run_values: dict[str, Any], small_mixtral: Path, tmp_path: Path
) -> None:
    quantize(str(small_mixtral), tmp_path / "nf4")
    with pytest.raises(ConfigError, match=r"lora\.init: loftq corrects what 4 bits lost, and .* is an NF4 folder"):
        make_plan(parse_config(with_keys(run_values, lora={"init": "loftq"}) | {"model": str(tmp_path / "nf4")}))


def test_several_processes_do_not_make_one(run_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.init: loftq is made by one process alone, and 2 were asked for"):
        expertune.plan(with_keys(run_values, lora={"init": "loftq"}), devices=2, memory="8GB")


def test_too_little_text_to_calibrate_by_is_one_error(run_values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data.train: \d+ tokens, and the calibration wants 8192 of them"):
        trained(with_keys(run_values, lora={"init": "qera"}))


def test_of_a_pair_the_chosen_answer_counts_for_the_calibration(run_values: dict[str, Any], tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b c d " * 40} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = {key: run_values[key] for key in ("model", "lora")} | {"objective": "dpo"}
    values |= {"data": {"train": str(tmp_path / "pairs.jsonl")}, "output_dir": str(tmp_path / "run")}
    few = {"lora": {"init": "qera", "dropout": 0.0}, "quantization": {"calibration_tokens": 1024}}
    with pytest.raises(DataError, match=r"data.train: \d{3} tokens, and the calibration wants 1024 of them"):
        expertune.finetune(with_keys(values, **few))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init": "loftq", "init_from": "somewhere"}, "init: loftq and init_from are two beginnings"),
        ({"init": "loftq", "use_dora": True}, "init: loftq corrects all 4-bit matrices, and use_dora scales"),
        ({"init": "qera", "experts": {"share": 0.5}}, "init: qera corrects all .* changes some of them; remove one"),
        ({"init": "qera", "expert_rank": "load"}, "init: qera corrects all .* changes some of them; remove one"),
        ({"init": "pissa", "init_from": "somewhere"}, "init: pissa and init_from are two beginnings"),
        ({"init": "pissa", "use_dora": True}, "init: pissa begins with components .* use_dora scales what they give"),
        ({"init": "pissa", "experts": {"share": 0.5}}, "init: pissa begins with components .* changes some of them"),
        ({"init": "pissa", "expert_rank": "scaled"}, "init: pissa gives .* twice the rank, which expert_rank would"),
    ],
)
def test_what_cannot_go_with_another_beginning_is_refused(
    run_values: dict[str, Any], lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(with_keys(run_values, lora=lora))


def test_a_folder_is_quantized_by_the_calibration_of_a_run(
    corrected: tuple[Path, dict[str, Any]], small_mixtral: Path, tmp_path: Path
) -> None:
    whole, _ = corrected
    expertune.quantize(small_mixtral, tmp_path / "nf4", calibration=whole / "calibration.safetensors")
    run = expertune.open_run(whole, model=tmp_path / "nf4")
    assert expertune.evaluate(run)["loss"] == pytest.approx(RunRecord.load(whole)["eval"]["loss"][-1][1], abs=1e-6)
    with pytest.raises(ConfigError, match=r"quantization\.fit is calibrated, and there is no calibration"):
        expertune.quantize(small_mixtral, tmp_path / "other", fit="calibrated")


def test_weights_by_another_calibration_are_another_base(
    corrected: tuple[Path, dict[str, Any]], small_mixtral: Path, tmp_path: Path
) -> None:
    whole, _ = corrected
    calibration = whole / "calibration.safetensors"
    held = RunRecord.load(whole)["model"]["base"]
    assert held["calibration"] == hash_file(calibration).sha256
    same = expertune.load_model(small_mixtral, "float32", "cpu", calibration=calibration)
    expertune.load_adapter(same, whole / "adapter")
    other = tmp_path / "other.safetensors"
    Moments({name: 2 * tensor for name, tensor in Moments.load(calibration).tensors.items()}).save(other)
    with pytest.raises(CheckpointError, match=r"the calibration of quantization\.fit was .*quantize --calibration"):
        expertune.load_adapter(
            expertune.load_model(small_mixtral, "float32", "cpu", calibration=other), whole / "adapter"
        )
    with pytest.raises(
        CheckpointError, match=rf"fit was calibrated and is absmax.* \(sha256 {held['calibration'][:12]}\)"
    ):
        expertune.load_adapter(expertune.load_model(small_mixtral, "float32", "cpu"), whole / "adapter")
    expertune.quantize(small_mixtral, tmp_path / "nf4", calibration=other)
    with pytest.raises(CheckpointError, match=r"the calibration of quantization\.fit was "):
        expertune.open_run(whole, model=tmp_path / "nf4")
    with pytest.raises(CheckpointError, match=r"the calibration of quantization\.fit was "):
        open_source(whole, model=tmp_path / "nf4", base="dequantized")
    own, foreign = hash_file(other).sha256[:12], hash_file(calibration).sha256[:12]
    told = rf"^calibration: .*nf4 have been chosen already, by that of sha256 {own}, .* has the sha256 {foreign}"
    for given in (other, calibration):  # the folder's own is taken, and says nothing new
        with pytest.raises(ConfigError, match=told) if given == calibration else nullcontext():
            expertune.load_model(tmp_path / "nf4", "float32", "cpu", calibration=given)
    with pytest.raises(ConfigError, match=r"calibration: it is for fit='calibrated', and fit is 'mse'"):
        expertune.load_model(small_mixtral, fit="mse", calibration=calibration)


def test_a_run_that_goes_on_has_the_calibration_of_the_first_or_is_refused_before_it_loads(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    values = with_keys(going_on(values, whole / "adapter", tmp_path / "run"), training={"seed": 5})
    alone = tmp_path / "alone"
    for part in ("adapter", "initial_adapter"):
        shutil.copytree(whole / part, alone / part)
    moved = with_keys(values, lora={"init_from": str(alone / "adapter")}) | {"output_dir": str(tmp_path / "moved")}
    with pytest.raises(CheckpointError, match=r"scales are by a calibration .*alone/calibration.safetensors is not it"):
        trained(moved)
    assert not (tmp_path / "moved").exists()
    said = io.StringIO()
    run = finetune(parse_config(values), console=Console(file=said)).output_dir
    name = "calibration.safetensors"
    assert f"calibration: taken over from {whole / name}" in said.getvalue()
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert RunRecord.load(run)["model"]["base"] == RunRecord.load(whole)["model"]["base"]


def test_a_run_that_makes_another_calibration_than_its_adapter_has_says_so(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    for part in ("adapter", "initial_adapter"):
        shutil.copytree(whole / part, tmp_path / part)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        notes, base = file.metadata(), json.loads(file.metadata()["expertune.base"])
    del base["calibration"]  # as earlier releases wrote it
    save_file(load_file(path), path, metadata=notes | {"expertune.base": json.dumps(base)})
    values = going_on(values, path.parent, tmp_path / "run")
    said = io.StringIO()
    finetune(parse_config(values), console=Console(file=said))
    told = (
        f"by another calibration, which its files do not name, and there is no {tmp_path / 'calibration.safetensors'}"
    )
    assert told in said.getvalue()


def test_a_run_that_has_taken_over_a_calibration_is_resumed_on_it(
    corrected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, values = corrected
    values = going_on(values, whole / "adapter", tmp_path / "run")
    # The training data would be too small for a calibration of its own.
    values["quantization"] = values["quantization"] | {"calibration_tokens": 8192}
    run = trained(values)
    name = "adapter/adapter_model.safetensors"
    for again, missing in (("stopped", ["adapter"]), ("killed", ["adapter", "checkpoint-1"])):
        run_dir = copy_of(run, tmp_path / again, *missing)
        if again == "killed":  # while it was loading
            (run_dir / "calibration.safetensors").unlink()
            record = RunRecord.load(run_dir)
            del record.values["model"]["calibration"]
            record.save()
        trained(values | {"output_dir": str(run_dir)}, resume=True)
        assert (run_dir / name).read_bytes() == (run / name).read_bytes()


def test_the_plan_knows_the_memory_and_the_time_of_it(run_values: dict[str, Any]) -> None:
    plain = make_plan(parse_config(run_values))
    made = make_plan(parse_config(with_keys(run_values, lora={"init": "qera"})))
    assert not {"initialization", "calibration"} & plain.memory.totals.keys()
    assert {"initialization", "calibration"} <= made.memory.totals.keys()
    assert made.memory.phases["initialization"]["matrix"] == 16 * 64 * 64
    # 2 layers with 4 linears and 4 experts of 3 matrices.
    assert any("lora.init: 32 matrices are decomposed once" in note for note in made.notes)


def test_preferences_compare_with_the_adapter_as_it_began(run_values: dict[str, Any]) -> None:
    values = {key: value for key, value in run_values.items() if key != "training"} | {"objective": "dpo"}
    values["lora"] = {"r": 4, "targets": ["attention", "experts"]}
    assert not keeps_start(parse_config(values))
    assert keeps_start(parse_config(with_keys(values, lora={"init": "loftq"})))
