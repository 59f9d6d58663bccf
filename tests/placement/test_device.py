"""Device, compute dtype, and what a host gives back."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from expertune.errors import ConfigError
from expertune.kernels import cpu
from expertune.placement.device import bound_host_memory, resolve_compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("instruction_sets", "dtype"),
    [
        (("avx2",), torch.float32),
        (("avx2", "avx512_f"), torch.float32),
        (("avx512_f", "avx512_bf16"), torch.bfloat16),
        (("amx_tile", "amx_bf16"), torch.bfloat16),
    ],
)
def test_auto_on_a_cpu_is_bfloat16_where_it_multiplies_it(monkeypatch, instruction_sets, dtype):
    monkeypatch.setattr(cpu, "cpu_instruction_sets", lambda: instruction_sets)
    assert resolve_compute_dtype("auto", CPU) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_on_cuda_is_bfloat16_from_ampere_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_compute_dtype("auto", CUDA) == dtype


def test_a_dtype_that_is_asked_for_is_taken():
    assert resolve_compute_dtype("float16", CPU) == torch.float16


def test_an_unknown_dtype_is_told():
    with pytest.raises(ConfigError, match="'int8' is none of auto, bfloat16, float16, float32"):
        resolve_compute_dtype("int8", CPU)


def test_instruction_sets_on_a_torch_without_its_table_of_features(monkeypatch):
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(_is_avx512_bf16_supported=lambda: True))
    assert [name for name, there in cpu._cpu_capabilities().items() if there] == ["avx512_bf16"]


def test_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ["MALLOC_ARENA_MAX"] = "4"  # so that this process keeps its allocator as it is
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "7"
    os.environ.pop("LRU_CACHE_CAPACITY", None)
    bound_host_memory()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == "128"


FRAGMENT = """
import torch
from expertune.placement.device import bound_host_memory

def resident():
    # Without pages of libraries, of which as many are resident as the page cache had at hand.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

{call}
keep = []
for size in range(8):  # blocks that are given back between blocks that stay, as layers leave their inputs behind
    large = [torch.ones(2**20 * 12, dtype=torch.uint8) for _ in range(8)]
    keep.append(torch.ones(2**17, dtype=torch.uint8))
    del large
    torch.ones(2**20 * 20, dtype=torch.uint8)
    before = resident()
print(before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_memory_that_tensors_gave_back_leaves_the_process():
    def run(call):
        source = FRAGMENT.format(call=call)
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert run("bound_host_memory()") < run("") - 20
