"""Whether there may be a GPU is known without torch, and never denied where torch would find one."""

from pathlib import Path

import pytest

from tests.processes import run_program

ASK = """
import sys
sys.path[:0] = sys.argv[1:]
from expertune.placement.presence import may_have_gpu
may = may_have_gpu()
print(may, "torch" in sys.modules)
"""


def test_without_torch_imported_it_is_not_denied_where_torch_finds_one():
    ended = run_program(f"{ASK}import torch\nprint(torch.cuda.is_available())", imports="import sys")
    may, imported, found = ended.out.split()
    assert imported == "False"
    assert may == "True" or found == "False"


@pytest.mark.parametrize(
    ("version", "may"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "False"),
        ("cuda = None\nhip = None\n", "False"),
        ("nothing = 1\n", "True"),
        ("cuda = None\n", "True"),
        (None, "True"),
    ],
)
def test_a_build_without_cuda_and_rocm_has_none_and_one_that_does_not_say_may(tmp_path: Path, version, may):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    if version is not None:
        (tmp_path / "torch" / "version.py").write_text(version)
    assert run_program(ASK, str(tmp_path), imports="import sys").out.split() == [may, "False"]
