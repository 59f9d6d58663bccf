"""What a plan has of this CPU without torch is what torch says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertune.kernels import processor
from tests.processes import run_program

ASKED = """
import json, sys
from dataclasses import asdict
from expertune.kernels.processor import processor
kept = asdict(processor())
print(json.dumps([kept, "torch" in sys.modules]))
"""
BY_TORCH = """
import json, torch
from expertune.kernels.cpu import cpu_instruction_sets
print(json.dumps({"instruction_sets": cpu_instruction_sets(), "threads": torch.get_num_threads()}))
"""


def said(code: str, **environment: str) -> Any:
    return json.loads(run_program(code, imports="import sys", **environment).out.splitlines()[-1])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_second_process_has_what_torch_says_without_torch(cache):
    environment = {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    by_torch = said(BY_TORCH, **environment)
    assert said(ASKED, **environment) == [by_torch, True]
    assert said(ASKED, **environment) == [by_torch, False]
    (path,) = (cache / "expertune").glob("processor-*.json")
    path.write_text('{"instruction_sets": [], "threads": 0}')
    assert said(ASKED, **environment) == [by_torch, True]


def test_other_variables_are_asked_for_again(cache):
    environment = {"XDG_CACHE_HOME": str(cache)}
    asked = [said(ASKED, OMP_NUM_THREADS=count, MKL_NUM_THREADS=count, **environment) for count in "12"]
    assert [kept["threads"] for kept, _ in asked] == [1, 2]


def cpuinfo(mhz: str, flags: str = "fpu avx2") -> str:
    core = f"model name\t: A CPU\ncpu MHz\t\t: {mhz}\ncpu cores\t: 1\nflags\t\t: {flags}\nbogomips\t: {mhz}\n"
    return "".join(f"processor\t: {number}\n{core}\n" for number in range(2))


def test_a_core_that_runs_at_another_frequency_is_the_same_cpu(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_CPUINFO", info)
    info.write_text(cpuinfo("2445.404"))
    known = processor._decides()
    info.write_text(cpuinfo("1500.000"))
    assert processor._decides() == known
    info.write_text(cpuinfo("2445.404", "fpu avx2 avx512f"))
    assert processor._decides() != known


def test_instruction_sets_are_asked_for_again_where_they_are_asked_otherwise(tmp_path, monkeypatch):
    known = processor._decides()
    monkeypatch.setattr(processor, "__file__", str(tmp_path / "processor.py"))
    (tmp_path / "cpu.py").write_text("# another release")
    assert processor._decides() != known
