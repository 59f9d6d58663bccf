"""Device, compute dtype, and what a host gives back."""

from types import SimpleNamespace

import pytest
import torch

from expertune.errors import ConfigError
from expertune.kernels import cpu
from expertune.placement.device import resolve_compute_dtype

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
    with pytest.raises(ConfigError, match=r"dtype has to be one of auto, bfloat16, float16, float32, .*, got 'int8'"):
        resolve_compute_dtype("int8", CPU)


def test_instruction_sets_on_a_torch_without_its_table_of_features(monkeypatch):
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(_is_avx512_bf16_supported=lambda: True))
    assert [name for name, there in cpu._cpu_capabilities().items() if there] == ["avx512_bf16"]
