"""torch that is imported when something of it is used is torch as it always is."""

from tests.processes import run_program

UNREAD = """
import sys
from expertune.cli.lazy_torch import import_torch_when_used
import_torch_when_used()
import torch
import torch as again
print("torch.nn" in sys.modules, torch.__spec__.name)
"""


def test_torch_is_imported_when_something_of_it_is_used_and_is_the_module_that_was_there():
    use = """
value = torch.ones(2).sum().item()
import_torch_when_used()
from torch import nn
print(value, "torch.nn" in sys.modules, torch is again is sys.modules["torch"], torch.nn is nn, type(torch).__name__)
"""
    ended = run_program(UNREAD + use, imports="import sys")
    assert ended.out.splitlines() == ["False torch", "2.0 True True True module"], ended.err


def test_a_submodule_brings_torch_first():
    use = """
import torch.nn.functional as F
print(F.relu(torch.tensor(-1.0)).item(), torch.__version__ == torch.version.__version__)
"""
    ended = run_program(UNREAD + use, imports="import sys")
    assert ended.out.splitlines() == ["False torch", "0.0 True"], ended.err


def test_a_torch_that_is_not_there_stays_missing():
    code = """
import sys
sys.path[:] = [each for each in sys.path if "site-packages" not in each]
sys.path_importer_cache.clear()
from expertune.cli.lazy_torch import import_torch_when_used
import_torch_when_used()
print("torch" in sys.modules)
"""
    assert run_program(code, imports="import sys, expertune.cli").out.splitlines() == ["False"]
