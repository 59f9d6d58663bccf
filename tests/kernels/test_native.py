"""The C library is built once, where it can be; where it cannot, the reason is said and everything still runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertune.kernels import native
from expertune.kernels.native import build

PROBE = """
import torch
from expertune.kernels import native, routes
from expertune.kernels.nf4 import Nf4Stack
from expertune.kernels.grouped_linear import grouped_linear

print(native.available(), "|", native.status().reason)
stack = Nf4Stack(2, 64, 64)
for index in range(2):
    stack.write(index, torch.eye(64))
out = grouped_linear(torch.eye(64), stack, torch.tensor([64]))
assert out.shape == (64, 128) and float(out.trace()) > 60
print(routes.say(routes.describe(torch.device("cpu"), torch.float32)))
"""


def in_a_process(**environment: str) -> str:
    """What a fresh process says of its library; PATH is emptied where a compiler must not be found."""
    inherited = {name: value for name, value in os.environ.items() if name != build.SWITCH}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"EXPERTUNE_NATIVE": "0"}, "switched off by EXPERTUNE_NATIVE=0"),
        ({"PATH": "/nonexistent", "CC": ""}, "no C compiler found"),
        ({"CC": "/nonexistent/cc"}, "/nonexistent/cc could not build it"),
        ({"CC": "false"}, "false could not build it"),
    ],
)
def test_without_the_library_products_run_and_the_reason_is_said(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    said = in_a_process(**environment, XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("False")
    assert said.count(reason) == 2
    assert "by torch and bitsandbytes alone" in said


def test_library_is_built_once_and_found_again(tmp_path: Path) -> None:
    if not native.available():
        pytest.skip(native.status().reason)
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)).startswith("True")
    (library,) = (tmp_path / "expertune").glob("native-*.so")
    built = library.stat().st_mtime_ns
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)).startswith("True")
    assert library.stat().st_mtime_ns == built
    assert {path.suffix for path in (tmp_path / "expertune").iterdir()} <= {".so", ".json"}


def test_cache_that_cannot_be_written_gives_way_to_a_folder_of_the_users_own(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build.cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0


def test_folder_that_others_may_write_is_refused(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"expertune-{os.getuid()}").mkdir()
    (tmp_path / f"expertune-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others; remove it, or set XDG_CACHE_HOME"):
        build.cache_folder()
