"""Every kernel that a layer launches compiles for every target without a device, spills at most 8 bytes, and fits.

By default each kernel in one variant, for one target with the Triton that is installed; `make test-targets` compiles
every variant for every target, some with the oldest Triton that is supported. That one is installed beside the
environment (its folder is `.triton-oldest`), because two cannot be in one.
"""

import pytest
import triton

from tests.kernels.gpu.compilation import AHEAD, BY_DEFAULT, ROOT, Compilation

OLDEST = ROOT / ".triton-oldest"
TARGETS = {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
DEFAULT_TARGET = "sm_90"
# Each target with one of the two, AMD's with both; every target with both in the slow test.
OLDEST_TARGETS = {"sm_80", "sm_100", "gfx942"}
NEWEST_TARGETS = {"sm_89", DEFAULT_TARGET, "sm_120", "gfx942"}
KERNELS = {
    "dequantize_kernel",
    "dequantize_mxfp4_kernel",
    "grouped_gemm_kernel",
    "input_gradient_kernel",
    "shrink_kernel",
    "expand_kernel",
    "outer_kernel",
    "count_kernel",
    "sort_kernel",
    "gate_backward_kernel",
    "combine_kernel",
}


def versions() -> list[object]:
    missing = pytest.mark.skipif(not OLDEST.exists(), reason="make .triton-oldest installs it")
    return [pytest.param(None, id="installed"), pytest.param(OLDEST, id="oldest", marks=missing)]


def assert_mixtrals_layer_compiles(compilation: Compilation, triton_version: str, targets: set[str]) -> None:
    found = compilation.result()
    assert found["triton"] == triton_version
    kernels = found["kernels"]
    assert {kernel["target"] for kernel in kernels} == targets
    for target in targets:
        here = [kernel for kernel in kernels if kernel["target"] == target]
        assert {kernel["kernel"] for kernel in here} == KERNELS
        assert {kernel["constants"].get("SHUFFLE") for kernel in here} >= {int(target != "gfx942")}
    assert all(kernel["spilled_bytes"] <= 8 for kernel in kernels)
    assert all(0 < kernel["registers"] <= (512 if kernel["target"] == "gfx942" else 255) for kernel in kernels)


def test_kernels_of_mixtrals_layer_compile_and_spill_next_to_nothing(tmp_path):
    compilation = AHEAD.pop() if AHEAD else Compilation(tmp_path, BY_DEFAULT)
    assert_mixtrals_layer_compiles(compilation, triton.__version__, {DEFAULT_TARGET})


@pytest.mark.targets
@pytest.mark.parametrize("folder", versions())
def test_kernels_of_mixtrals_layer_compile_for_every_target_and_spill_next_to_nothing(folder, tmp_path):
    assert NEWEST_TARGETS | OLDEST_TARGETS == TARGETS
    targets = OLDEST_TARGETS if folder else NEWEST_TARGETS
    settings = ["--shapes", "mixtral-8x7b", "--tokens", "320", "--quick"]
    settings += ["--targets", *(target.removeprefix("sm_") for target in sorted(targets))]
    compilation = Compilation(tmp_path, tuple(settings), folder)
    assert_mixtrals_layer_compiles(compilation, "3.6.0" if folder else triton.__version__, targets)


@pytest.mark.slow
@pytest.mark.parametrize("folder", versions())
def test_kernels_of_many_small_experts_and_of_many_tokens_compile_too(folder, tmp_path):
    kernels = Compilation(tmp_path, (), folder).result()["kernels"]
    assert len(kernels) > 400
    assert {kernel["target"] for kernel in kernels} == TARGETS
