"""The C library is built once, where it can be; where it cannot, the reason is said and everything still runs."""

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from expertune.kernels import native
from expertune.kernels.native import build
from tests.processes import BENEATH, run_program

PROBE = """
import os
import torch
from expertune.kernels import native, routes
from expertune.kernels.linear import nf4_linear
from expertune.kernels.nf4 import Nf4Stack

print(native.available(), "|", native.status().reason)
if native.available():
    file = os.stat(native.status().reason)
    print(file.st_ino, file.st_mtime_ns)
stack = Nf4Stack(1, 64, 64)
stack.write(0, torch.eye(64))
settings = routes.KernelSettings(crossover=64)  # measuring it takes seconds
out = nf4_linear(torch.eye(64), stack.bytes, settings)
assert out.shape == (64, 64) and float(out.trace()) > 60
print(routes.summarize(settings.describe(torch.device("cpu"), torch.float32)))
"""

# Why there is no library, and the environment in which there is none; PATH is emptied where no compiler is to be found.
WITHOUT = {
    "switched off by EXPERTUNE_NATIVE=0": {"EXPERTUNE_NATIVE": "0"},
    "no C compiler found": {"PATH": "/nonexistent", "CC": ""},
    "/nonexistent/cc could not build it": {"CC": "/nonexistent/cc"},
    "false could not build it": {"CC": "false"},
}


def probe(cache: Path, **environment: str) -> str:
    """What a process says of its library."""
    ended = run_program(PROBE, imports=BENEATH, **{"XDG_CACHE_HOME": str(cache)} | environment)
    assert ended.status == 0, ended.err[-2000:]
    return ended.out


@pytest.mark.parametrize("reason", WITHOUT)
def test_without_the_library_gemms_run_and_the_reason_is_said(reason: str, tmp_path: Path) -> None:
    said = probe(tmp_path, **WITHOUT[reason])
    assert said.startswith("False")
    assert said.count(reason) == 2
    assert "by torch and bitsandbytes alone" in said


def test_library_is_built_once_and_found_again(tmp_path: Path) -> None:
    if not native.available():
        pytest.skip(native.status().reason)
    first, second = probe(tmp_path), probe(tmp_path)
    assert first.startswith("True")
    assert first == second  # path, inode and time of the file included
    assert {path.suffix for path in (tmp_path / "expertune").iterdir()} <= {".so", ".json"}


def test_what_is_compiled_is_what_the_librarys_name_is_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not native.available():
        pytest.skip(native.status().reason)
    monkeypatch.setattr(build, "SOURCES", ("one.c",))
    source = tmp_path / "one.c"
    text = '#include "one.h"\n__attribute__((visibility("default"))) int which(void) { return ONE; }\n'
    sources = {"one.h": b"#define ONE 1\n", "one.c": text.encode()}
    source.write_text(text.replace("ONE", "2"))  # as if it were edited while its library is built
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build._compile(["cc"], tmp_path / "native-1.so", sources)
    assert ctypes.CDLL(str(tmp_path / "native-1.so")).which() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one.c", "native-1.so"}


def test_library_that_others_may_have_written_is_built_anew_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not native.available():
        pytest.skip(native.status().reason)
    good = Path(native.status().reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planted = tmp_path / "expertune" / good.name
    planted.parent.mkdir(mode=0o700)
    planted.write_bytes(b"another's")
    planted.chmod(0o777)

    def compile_(compiler: list[str], path: Path, sources: Mapping[str, bytes]) -> None:
        path.unlink()
        shutil.copy(good, path)  # compiling takes seconds, and gives these bytes

    monkeypatch.setattr(build, "_compile", compile_)
    loaded = build.status.__wrapped__()
    assert (loaded.reason, loaded.library is None) == (str(planted), False)
    monkeypatch.setattr(build, "_compile", lambda compiler, path, sources: path.chmod(0o777))
    planted.chmod(0o777)
    refused = build.status.__wrapped__()
    assert refused.library is None
    assert "can be written by others" in refused.reason
