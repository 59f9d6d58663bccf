"""A run with attention in 16 bits is opened, answers, is continued and exported as it was trained, and on no others."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open

import expertune
from expertune import finetune
from expertune.adapt.files import read_adapter_base
from expertune.config import parse_config
from expertune.errors import CheckpointError
from expertune.exporting.opening import open_source
from expertune.run.record import RunRecord
from tests.train.conftest import nine_steps

LAYERS = {"attention": 16}
CANONICAL = {"k_proj": 16, "o_proj": 16, "q_proj": 16, "v_proj": 16}
REFUSED = r"other 4-bit weights .*quantization\.layers was \{k_proj: 16, .*\} and is \{\}"


def trained(values: dict[str, Any]) -> Path:
    return finetune(parse_config(values), console=Console(file=io.StringIO())).output_dir


@pytest.fixture(scope="module")
def values(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    values = nine_steps(small_mixtral, rows_file, tmp_path_factory.mktemp("mixed") / "run")
    values["quantization"] |= {"layers": LAYERS}
    values["lora"] |= {"targets": ["attention", "experts"]}
    values["training"] |= {"max_steps": 1, "save_steps": 1, "eval_steps": 1}
    return values


@pytest.fixture(scope="module")
def mixed(values: dict[str, Any]) -> Path:
    return trained(values)


@pytest.fixture(scope="module")
def folders(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """NF4 folders of the model: with the run's layers, and plain."""
    folder = tmp_path_factory.mktemp("folders")
    expertune.quantize(small_mixtral, folder / "mixed", layers={"[kqvo]_proj": 16})
    expertune.quantize(small_mixtral, folder / "plain")
    return folder / "mixed", folder / "plain"


def test_record_and_adapter_say_what_is_in_16_bits_and_the_run_answers(mixed: Path, folders: tuple[Path, Path]) -> None:
    record = RunRecord.load(mixed)
    assert record["model"]["base"]["layers"] == CANONICAL
    base = read_adapter_base(mixed / "adapter")
    assert base is not None
    assert base.to_json() == record["model"]["base"]
    loss = pytest.approx(record["eval"]["loss"][-1][1], abs=1e-6)
    run = expertune.open_run(mixed)
    assert expertune.evaluate(run)["loss"] == loss
    assert isinstance(expertune.generate(run, "What is 1 plus 2?", max_new_tokens=2), str)
    assert isinstance(expertune.chat(run, max_new_tokens=2).ask("What is 1 plus 2?"), str)


def test_a_folder_of_plain_nf4_is_refused_for_the_run_and_for_one_that_goes_on(
    values: dict[str, Any], mixed: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    same, plain = folders
    with pytest.raises(CheckpointError, match=rf"{REFUSED}.*, or give .*other-base") as error:
        expertune.open_run(mixed, model=plain)
    assert f"weights of {values['model']} than {plain} holds" in str(error.value)
    further = values | {"output_dir": str(tmp_path / "run"), "quantization": {"compute_dtype": "float32"}}
    further["lora"] = values["lora"] | {"init_from": str(mixed / "adapter")}
    for model in (plain, Path(values["model"])):
        with pytest.raises(CheckpointError, match=REFUSED):
            trained(further | {"model": str(model)})
        assert not (tmp_path / "run").exists()
    assert expertune.evaluate(expertune.open_run(mixed, model=plain, other_base=True))["loss"] > 0
    assert expertune.evaluate(expertune.open_run(mixed, model=same))["loss"] > 0
    said = io.StringIO()
    taken = further | {"output_dir": str(tmp_path / "taken"), "lora": further["lora"] | {"init_from_other_base": True}}
    finetune(parse_config(taken), console=Console(file=said, width=1000))
    assert "lora.init_from: " in said.getvalue()
    assert "taken on another base than it was trained on: quantization.layers was {k_proj: 16" in said.getvalue()
    run = trained(further | {"model": str(same)})
    assert read_adapter_base(run / "adapter") == read_adapter_base(mixed / "adapter")


def test_exports_take_the_source_or_the_run_s_own_values(
    values: dict[str, Any], mixed: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    same, plain = folders
    for form in ("peft", "merged"):
        out = expertune.export(mixed, to=form, out=tmp_path / form, verify=False).folder
        assert any(out.glob("*.safetensors"))
    # A run on the NF4 folder names no layers, and is exported from the checkpoint that the folder was made of.
    on_folder = values | {"model": str(same), "output_dir": str(tmp_path / "run")}
    run = trained(on_folder | {"quantization": {"compute_dtype": "float32"}})
    assert open_source(run, model=values["model"], base="dequantized").recipe.whole
    out = expertune.export(
        run, to="merged", base="dequantized", model=values["model"], out=tmp_path / "values", verify=False
    ).folder
    assert changed_attention(out, Path(values["model"])) == []
    open_source(run, model=plain)
    with pytest.raises(CheckpointError, match=REFUSED):
        open_source(run, model=plain, base="dequantized")


def changed_attention(out: Path, source: Path) -> list[str]:
    """Attention's weights that are far from the checkpoint's: one step of an adapter moves none of them by as much."""
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if "self_attn" in name}  # noqa: SIM118
    with safe_open(source / "model.safetensors", framework="pt") as file:
        return [
            name
            for name, values in found.items()
            if (values.float() - file.get_tensor(name).float()).abs().max() > 5e-3
        ]
