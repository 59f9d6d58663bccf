"""Python's garbage collector leaves out what commands import, and nothing else."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from expertune.terminal import importing


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> Iterator[None]:
    """As in a program that has just started; afterwards as `tests/conftest.py` has it."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()
    gc.enable()


def test_what_has_been_imported_is_left_out_by_the_collector() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert gc.isenabled()


def test_objects_that_an_interpreter_starts_with_are_not_a_programs_own() -> None:
    imports = "import gc; from expertune.terminal import importing"
    code = f"{imports}\nwith importing(): import json\nprint(gc.get_freeze_count())"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert int(said) > 2000  # Python 3.12 starts with 375


def test_failed_import_freezes_nothing() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()


def test_what_is_made_after_the_first_imports_can_be_collected_after_later_ones() -> None:
    with importing():
        pass
    frozen, made = gc.get_freeze_count(), [[] for _ in range(10_000)]
    with importing():
        pass
    assert gc.get_freeze_count() <= frozen
    assert len(made) == 10_000


def test_where_collection_is_off_it_stays_off() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
