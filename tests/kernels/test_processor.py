"""What a plan has of this CPU without torch is what torch says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

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
