"""A run directory that is resumed: what its record must have in common with the run file."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.run.directory import open_record
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
