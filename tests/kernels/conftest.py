"""Routes for the tests of GEMMs: what is claimed of one holds on all."""

from collections.abc import Iterator

import pytest

from expertune.kernels import cpu, native
from tests.kernels.settings import SETTINGS


@pytest.fixture(params=["dequant_gemm", "fused"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each route in turn; the fused one where the native library could be built."""
    if request.param == "fused" and not native.available():
        pytest.skip(native.status().reason)
    SETTINGS.route = request.param
    yield request.param
    SETTINGS.route, SETTINGS.working_set_bytes = "auto", None


@pytest.fixture(params=["as this CPU multiplies", "in 16 bits"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """16-bit tensors multiplied in the dtype that this CPU takes, and as a CPU with instructions for them does."""
    if request.param == "in 16 bits":
        monkeypatch.setattr(cpu, "cpu_instruction_sets", lambda: ("avx512_bf16", "avx512_fp16"))
    return str(request.param)
