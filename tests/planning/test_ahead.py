"""A first plan that is made without libraries that no shape depends on has the shapes that it has with them."""

import json
import sys

import pytest

from expertune.planning import ahead
from tests.planning.conftest import FILES
from tests.processes import run_program
from tests.tiny_models import FAMILIES, tiny_config

BOTH = """
import json, sys
from pathlib import Path
from expertune.config import parse_config
from expertune.kernels.amounts import BFLOAT16
from expertune.planning.ahead import plan_ahead
folders, out = json.loads(sys.argv[1]), Path(sys.argv[2])

def read():
    from pydantic import TypeAdapter
    from expertune.planning.reading import read_shapes
    from expertune.planning.shapes import Shapes
    found = {}
    for folder in folders:
        values = {"model": folder, "data": {"train": "rows.jsonl"}, "output_dir": "out"}
        shapes = read_shapes(parse_config(values, "test"), BFLOAT16)
        kept = TypeAdapter(Shapes).dump_json(shapes, warnings=False).decode()
        found[folder] = [kept, shapes.inventory.cached_numbers]
    return found

def plan():
    without = read()
    loaded = [name for name in ("scipy.optimize", "torch._dynamo.convert_frame") if name in sys.modules]
    out.write_text(json.dumps([without, loaded]))

plan_ahead(plan)()
without, loaded = json.loads(out.read_text())
assert "torch" not in sys.modules
differ = [folder for folder, kept in read().items() if without[folder] != kept]
print(json.dumps([len(without), differ, loaded, "torch._dynamo.convert_frame" in sys.modules]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="planned ahead on Linux alone")
def test_every_family_has_the_same_shapes_without_them(tmp_path):
    folders = [str(FILES / name) for name in ("mixtral-8x7b-v0.1", "deepseek-v2-lite")]
    for family in FAMILIES:
        tiny_config(family, dtype="bfloat16").save_pretrained(tmp_path / family)
        folders.append(str(tmp_path / family))
    ended = run_program(BOTH, json.dumps(folders), str(tmp_path / "out.json"), imports="import sys")
    assert ended.out.splitlines()[-1:] == [json.dumps([len(folders), [], [], True])], ended.err[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="planned ahead on Linux alone")
def test_a_copy_that_fails_or_prints_is_not_noticed(tmp_path):
    code = """
import sys
from pathlib import Path
from expertune.planning.ahead import plan_ahead

def plan():
    print("said", flush=True)
    Path(sys.argv[1]).write_text("begun")
    raise RuntimeError("failed")

plan_ahead(plan)()
print("goes on", "torch" in sys.modules, "scipy" in sys.modules)
"""
    ended = run_program(code, str(tmp_path / "begun"), imports="import sys")
    assert (ended.status, ended.out, ended.err) == (0, "goes on False False\n", "")
    assert (tmp_path / "begun").read_text() == "begun"


def test_a_process_with_other_threads_is_not_copied(monkeypatch):
    monkeypatch.setattr(ahead.threading, "active_count", lambda: 2)
    monkeypatch.setattr(ahead.os, "fork", None)
    assert ahead.plan_ahead(lambda: None)() is None
