"""What the doctor finds, and what it advises."""

import http.server
import importlib.metadata
import json
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


def test_a_native_library_that_does_not_load_is_an_error(monkeypatch):
    import bitsandbytes.cextension

    monkeypatch.setattr(doctor, "_library_of_cpus", lambda folder: None)  # as where there is a GPU
    assert found("bitsandbytes library")["status"] == "ok"
    monkeypatch.setattr(bitsandbytes.cextension, "lib", object())
    assert found("bitsandbytes library")["status"] == "error"


def test_a_damaged_native_library_of_cpus_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "lib.so").write_bytes(b"")
    monkeypatch.setattr(doctor, "_library_of_cpus", lambda folder: tmp_path / "lib.so")
    assert found("bitsandbytes library")["value"].startswith("does not load: ")


def test_on_a_cpu_the_library_is_the_one_that_bitsandbytes_loads(monkeypatch):
    import bitsandbytes.cextension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = bitsandbytes.cextension.get_native_library()._lib._name
    assert str(doctor._library_of_cpus(bitsandbytes.cextension.PACKAGE_DIR)) == loaded


def test_the_package_kernels_is_a_pitfall_on_a_cpu_with_bfloat16(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_instruction_sets", lambda: ("avx512_bf16",))
    assert found("package kernels") is None
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
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
