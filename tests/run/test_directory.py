"""A run directory that is resumed: what its record must have in common with the run file."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertune.checkpoint.adapter_folder import adapter_digests
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError
from expertune.run.directory import finished_line, open_record, require_kept_adapter
from expertune.run.identity import require_same_identity
from expertune.run.record import RunRecord

OLD_NAMES: dict[str, Any] = {"model": "m", "data": {"train": "t"}, "kernels": {"route": "decode_then_gemm"}}


@pytest.fixture
def earlier_run(tmp_path: Path) -> Path:
    """The directory of a run that an earlier release has recorded."""
    record = RunRecord.start(tmp_path / "run")
    record.values |= {"config": OLD_NAMES | {"output_dir": str(tmp_path / "run")}, "run": {"status": "stopped"}}
    record.save()
    return tmp_path / "run"


@pytest.mark.parametrize("route", ["decode_then_gemm", "dequant_gemm"])
def test_run_recorded_with_a_value_of_an_earlier_name_is_resumed_by_either_name(route: str, earlier_run: Path) -> None:
    config = parse_config(OLD_NAMES | {"kernels": {"route": route}, "output_dir": str(earlier_run)})
    record = open_record(config, earlier_run, resume=True)
    assert record["config"]["kernels"] == {"route": "dequant_gemm"}
    assert record["run"]["status"] == "running"


def test_run_recorded_with_a_value_of_an_earlier_name_is_not_resumed_with_another_value(earlier_run: Path) -> None:
    config = parse_config(OLD_NAMES | {"kernels": {"route": "fused"}, "output_dir": str(earlier_run)})
    with pytest.raises(ConfigError, match=r"kernels\.route was dequant_gemm when the run started and is fused now"):
        open_record(config, earlier_run, resume=True)


def test_section_that_was_absent_when_the_run_started_is_named_by_its_key_and_default(earlier_run: Path) -> None:
    record = json.loads((earlier_run / "record.json").read_text(encoding="utf-8"))
    del record["config"]["kernels"]
    (earlier_run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    values = {key: value for key, value in OLD_NAMES.items() if key != "kernels"} | {"output_dir": str(earlier_run)}
    message = r"kernels\.keep was auto when the run started and is 0 now; resume with the same values, or start a new"
    with pytest.raises(ConfigError, match=message):
        open_record(parse_config(values | {"kernels": {"keep": 0}}), earlier_run, resume=True)
    written_out = parse_config(values | {"kernels": {"keep": "auto"}})
    assert open_record(written_out, earlier_run, resume=True)["run"]["status"] == "running"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with the files of an adapter whose factors come back from them to the bit, and a card."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(b"a")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"b", "has changed, and the run began with it; restore it"),
        ("adapter_model.safetensors", b"b", "has changed, and the run began with it; restore it"),
        ("adapter_model.safetensors", None, "is missing, and the run began with it; restore it"),
        ("adapter_live.tensors", b"b", "was not there when the run began with this adapter; remove it"),
    ],
)
def test_each_file_that_factors_are_read_from_is_the_one_that_the_run_began_with(
    name: str, content: bytes | None, message: str, adapter: Path
) -> None:
    digests = adapter_digests(adapter)
    (adapter / "README.md").unlink()
    require_kept_adapter(adapter, digests)
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        require_kept_adapter(adapter, digests)


def test_of_an_earlier_record_the_weights_alone_are_compared(adapter: Path) -> None:
    digest = adapter_digests(adapter)["adapter_model.safetensors"]
    (adapter / "adapter_config.json").write_bytes(b"b")
    require_kept_adapter(adapter, digest)
    (adapter / "adapter_model.safetensors").write_bytes(b"b")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: has changed"):
        require_kept_adapter(adapter, digest)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_live.tensors"])
def test_adapter_to_start_from_is_compared_by_each_file_of_its_factors(name: str, adapter: Path) -> None:
    config = parse_config(OLD_NAMES | {"lora": {"init_from": str(adapter)}, "output_dir": str(adapter / "run")})
    record = RunRecord.start(adapter / "run")

    def resume() -> None:
        now = {"tokenizer": "", "template": None, "init_from": adapter_digests(adapter), "rows": {}}
        require_same_identity(record, config, Fingerprint(), now, {})

    found = adapter_digests(adapter)
    record.values["inputs"] = {"tokenizer": "", "template": None, "init_from": found}
    resume()
    (adapter / name).write_bytes(b"b")
    with pytest.raises(
        CheckpointError, match=r"resume: lora\.init_from: .* has changed since the run started; restore"
    ):
        resume()
    record.values["inputs"]["init_from"] = found["adapter_model.safetensors"]  # an earlier record
    if name != "adapter_model.safetensors":
        resume()


@pytest.mark.parametrize(("steps", "said"), [(1, "after 1 step;"), (2000, "after 2,000 steps;")])
def test_finished_run_tells_its_steps_in_the_number_that_they_have(steps: int, said: str, tmp_path: Path) -> None:
    record = RunRecord.start(tmp_path)
    record.values["train"] = {"steps": steps}
    assert said in finished_line(record)
