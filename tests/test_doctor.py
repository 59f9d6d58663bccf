"""What the doctor finds, and what it advises."""

import _ctypes
import http.server
import importlib.machinery
import importlib.metadata
import json
import sys
import threading

import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console

from expertune import doctor


def found(name):
    return next((finding for finding in doctor.collect() if finding["name"] == name), None)


def test_every_dependency_is_looked_at_and_in_range():
    packages = {finding["name"]: finding for finding in doctor.collect() if finding["topic"] == "packages"}
    assert {"torch", "transformers", "peft", "bitsandbytes", "safetensors"} <= set(packages)
    assert {finding["status"] for finding in packages.values()} == {"ok"}


def test_tools_of_developers_are_not_asked_for():
    assert found("pytest") is None


@pytest.mark.parametrize(
    ("requirement", "value", "status"),
    [
        ("torch>=999", f"{importlib.metadata.version('torch')}, needs >=999", "error"),
        ("no-such-package>=1.0", "missing", "error"),
        ("torch>=2.0", importlib.metadata.version("torch"), "ok"),
    ],
)
def test_a_missing_or_old_package_comes_with_its_mend(requirement, value, status):
    finding = doctor._package(Requirement(requirement))
    assert (finding["value"], finding["status"]) == (value, status)
    assert finding["advice"] == ("" if status == "ok" else f"pip install '{requirement}'")


def test_the_device_and_dtype_of_a_run_are_told():
    value = found("a run takes")["value"]
    assert value.startswith("cuda" if torch.cuda.is_available() else "cpu, products in ")


def test_offline_mode_is_told():
    assert found("mode")["value"].startswith("offline")  # as the whole test suite is


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def online(monkeypatch):
    """The hub is a server on this machine, at the address that comes with this."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address
        server.shutdown()


def asked():
    return {finding["name"]: finding for finding in doctor._hub()}


def test_a_hub_that_answers_is_told(online):
    assert asked()["connection"]["value"].startswith(f"{online} answers, in ")
    assert asked()["connection"]["status"] == "ok"


def test_a_hub_that_is_not_there_is_a_warning_and_no_error(online, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    finding = asked()["connection"]
    assert finding["value"].startswith("http://127.0.0.1:9 does not answer (")
    assert finding["status"] == "warning"
    assert "HF_HUB_OFFLINE=1" in finding["advice"]


def test_the_login_of_a_mirror_is_not_told(online, monkeypatch):
    for address in (online, "http://127.0.0.1:9"):
        monkeypatch.setattr(constants, "ENDPOINT", address.replace("://", "://user:p@ss@"))
        value = asked()["connection"]["value"]
        assert value.startswith(f"{address} ")
        assert "user" not in value
        assert "ss@" not in value


def test_offline_the_hub_is_not_asked():
    assert "connection" not in asked()


def of_the_library():
    finding = found("bitsandbytes library")
    return finding["status"], finding["value"]


@pytest.fixture
def with_a_gpu(monkeypatch):
    """bitsandbytes is imported, as where there is a GPU: the library depends on that."""
    monkeypatch.setattr(doctor, "_library_of_cpus", lambda folder: None)


def test_a_native_library_that_does_not_load_is_an_error(monkeypatch, with_a_gpu):
    from bitsandbytes import cextension

    assert of_the_library()[0] == "ok"
    monkeypatch.setattr(cextension, "lib", object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary))
    assert of_the_library() == ("error", "does not load")


def test_a_package_around_the_native_library_whose_import_fails_is_an_error(monkeypatch, with_a_gpu):
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    status, value = of_the_library()
    assert status == "error"
    assert value.startswith("does not load: ModuleNotFoundError: ")


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("bitsandbytes", None)])
def test_a_package_that_is_installed_and_not_found_by_imports_is_an_error(spec, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert of_the_library() == ("error", "not there: the package is installed, but cannot be imported")


def test_a_damaged_native_library_of_cpus_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "lib.so").write_bytes(b"")
    monkeypatch.setattr(doctor, "_library_of_cpus", lambda folder: tmp_path / "lib.so")
    assert of_the_library()[1].startswith("does not load: ")


def test_another_library_in_the_place_of_the_native_one_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "_library_of_cpus", lambda folder: _ctypes.__file__)
    assert of_the_library() == ("error", "loads, but has no cquantize_blockwise_cpu_fp32")


def test_on_a_cpu_the_library_is_the_one_that_bitsandbytes_loads(monkeypatch):
    import bitsandbytes.cextension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = bitsandbytes.cextension.get_native_library()._lib._name
    assert str(doctor._library_of_cpus(bitsandbytes.cextension.PACKAGE_DIR)) == loaded


def test_the_package_kernels_is_a_pitfall_on_a_cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_instruction_sets", lambda: ("avx512_bf16",))
    assert found("package kernels") is None
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "kernels" else real(name))
    assert "HF_HUB_OFFLINE=1" in found("package kernels")["advice"]


def test_findings_are_json():
    findings = doctor.collect()  # once: free memory differs from one look to the next
    assert json.loads(json.dumps(findings)) == findings


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_findings_fit_a_terminal_and_no_word_is_cut(width):
    findings = doctor.collect()
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(doctor.render(findings))
    assert "…" not in capture.get()
    assert max(map(len, capture.get().splitlines())) <= width
    words = {word for each in findings for word in f"{each['name']} {each['value']} {each['advice']}".split()}
    assert {word for word in words if len(word) < 40} <= set(capture.get().split())
