"""The CPU benchmarks at toy sizes: what they leave, and that no speed stands beside a wrong result."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.peers.processes import ROOT

import expertune
from benchmarks import decode, folders, layer, quantize, report, scaling, suite, workload
from expertune.checkpoint.reader import open_checkpoint

SIZES = {
    quantize: "--rows 64 --columns 128 --rounds 1",
    decode: "--rows 64 --columns 128 --rounds 1",
    layer: "--hidden 512 --intermediate 128 --experts 4 --tokens 24 --rounds 1",
}


def measured(module: ModuleType, folder: Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    path = folder / "result.json"
    module.run(parser.parse_args([*SIZES[module].split(), "--json", str(path)]))
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", SIZES, ids=lambda module: module.__name__)
def test_result_has_ours_and_peers_and_what_decides_them(module: ModuleType, tmp_path: Path) -> None:
    result = measured(module, tmp_path)
    assert {"device", "instruction_sets", "threads", "versions", "commit", "command"} <= result.keys()
    assert len(result["seconds"]) > 1
    assert all(times[0] > 0 for times in result["seconds"].values())


def test_layer_holds_every_route_and_peer_to_plain_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = measured(layer, tmp_path)["seconds"]
    assert {"ours, dequant_gemm", "bitsandbytes, per expert", "grouped_mm on decoded weights"} <= seconds.keys()
    plain = layer.Layer.by_grouped_mm
    monkeypatch.setattr(layer.Layer, "by_grouped_mm", lambda self, *args: plain(self, *args) * 1.1)
    with pytest.raises(report.CorrectnessError, match="grouped_mm on decoded weights: output is off by"):
        measured(layer, tmp_path)


def test_no_speed_is_reported_beside_wrong_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantize.quantize_matrix

    def wrong(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, *scales = right(matrix)
        packed[3, 7] ^= 1
        return packed, *scales

    monkeypatch.setattr(quantize, "quantize_matrix", wrong)
    with pytest.raises(report.CorrectnessError, match="not bitsandbytes'"):
        measured(quantize, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_table_is_written_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    results = {module.__name__: measured(module, tmp_path) for module in SIZES}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        suite.write_table(page, results)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- bench -->\n")
        assert text.endswith("<!-- /bench -->\nafter\n")
        assert "\nold\n" not in text
        assert text.count("| expert layer") == text.count("| NF4 quantization") == text.count("| NF4 decoding") == 1
    assert text.count("commit") == 1
    results[decode.__name__]["commit"] = "0123456789"
    suite.write_table(page, results)
    (row,) = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| NF4 decoding"))
    assert "commit 0123456" in row


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells a process's own peak")
def test_a_drivers_peak_is_not_that_of_the_process_that_started_it() -> None:
    size = 900 * 10**6
    before = b"1" * size
    code = "from benchmarks.peers.driver import _peak_bytes; print(_peak_bytes('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(before)


def test_peers_are_tried_in_the_dtypes_that_the_machine_multiplies() -> None:
    with_bfloat16, without = [torch.bfloat16, torch.float32], [torch.float32]
    fastest = report.resolve_dtype("auto", "cpu")
    assert report.dtypes_of_peers("auto", "cpu") == (without if fastest == torch.float32 else with_bfloat16)
    assert report.dtypes_of_peers("bfloat16", "cpu") == report.dtypes_of_peers("auto", "cuda") == [torch.bfloat16]


def test_sweep_cuts_real_text_into_sequences_of_one_length() -> None:
    batch, sequences = workload.text_batch(2048, workload.DOLLY_SAMPLE, sequence_tokens=1024)
    assert sequences == 2
    assert batch["cu_seq_lens_q"].tolist() == [0, 1024, 2048]
    assert torch.equal(batch["input_ids"], workload.text_batch(2048, workload.DOLLY_SAMPLE, 256)[0]["input_ids"])


def test_bounds_of_a_point_fall_with_what_it_has_to_compute() -> None:
    rates = {"expert": {"flops_per_second": 0.5e12}, "all rows": {"flops_per_second": 1e12}}
    of = {name: [scaling.bounds(each, rates) for each in curve.values()] for name, curve in scaling.CURVES.items()}
    assert len({round(bound["floor"], 6) for bound in of["tokens"][2:]}) == 1
    for grows in ("layers", "rank", "sequence"):
        floors = [bound["floor"] for bound in of[grows]]
        assert floors == sorted(floors, reverse=True)
        assert len(set(floors)) == len(floors)
    assert all(bound["own_rows"] < bound["floor"] for curve in of.values() for bound in curve)


def test_sweep_shows_each_point_once_in_each_of_its_curves(tmp_path: Path) -> None:
    point = scaling.BASE
    found = {"tokens_per_second": 1000.0, "dtype": "float32", "step_peak_bytes": 2e9}
    found |= {"bounds": {"floor": 2000.0, "own_rows": 1250.0}, "shares": {"floor": 0.5, "own_rows": 0.8}}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scaling -->\nold\n<!-- /scaling -->\nafter\n", encoding="utf-8")
    scaling.write_table(page, {"points": {point.name: found}, **report.environment()})
    text = page.read_text(encoding="utf-8")
    for row in ("tokens 2,048", "layers 2", "rank 8"):
        assert f"| {row} | 1,000 | 1.00 (1.00) | 2,000 | 50% | 80% | 2.00 GB |" in text
    assert "\nold\n" not in text
    assert len(scaling.draw({point.name: found}).axes) == 2 * 3


def test_a_result_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert report.read_own(path) is None
    here = report.environment()
    report.write(path, here)
    assert report.read_own(path) == here
    report.write(path, here | {"device": "another CPU"})
    with pytest.raises(SystemExit, match="of another CPU"):
        report.read_own(path)


def test_commands_name_nothing_of_this_machine_and_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(report.ROOT / "benchmarks" / "run.py")
    monkeypatch.setattr("sys.argv", [script, "step", "--json=/elsewhere/a.json", "--text", "/x/y", "two words"])
    assert report.environment()["command"] == "python benchmarks/run.py step --json=OUT --text OUT 'two words'"


@pytest.mark.slow
def test_folders_are_held_to_bitsandbytes_and_models_to_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_NOISE", 2**25)
    folders.write_source(tmp_path / "source", workload.Shape(512, 128, 2, 2, 1))
    expertune.quantize(str(tmp_path / "source"), str(tmp_path / "nf4"))
    folders._require_nf4(tmp_path)
    entries = open_checkpoint(tmp_path / "nf4").tensors
    expected = folders._checksum({key: entry.read for key, entry in entries.items()})
    for name in ("load_model", "from_pretrained"):
        assert folders._load_by(name, tmp_path, cold=False)["checksum"] == expected != 0
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", lambda matrix, **_: (matrix.byte(), None))
    with pytest.raises(report.CorrectnessError, match="is not bitsandbytes'"):
        folders._require_nf4(tmp_path)
