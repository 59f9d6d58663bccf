"""Grouped GEMMs of dequantized weights by torch's own `grouped_mm`, with the arguments of those in `grouped_gemm.py`.

On compute capability 9.0 and 10.0 torch multiplies groups in one launch, by CUTLASS; below and beside these it loops
over experts and waits for the host, and is not used. What an epilogue does in `grouped_gemm.py` takes a launch of its
own here. Which of the two is faster on a device is measured (`expert_mlp/calibrate.py`).

Shape suffixes: R routed tokens sorted by expert, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.kernels.gpu.grouped_gemm import Dequantized, Update
from expertune.kernels.gpu.grouped_gemm import grouped_gemm as own_grouped_gemm

_CAPABILITIES = ((9, 0), (10, 0))


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups in one launch on a device."""
    if not hasattr(torch.nn.functional, "grouped_mm") or dtype != torch.bfloat16 or torch.version.hip:
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _CAPABILITIES


def grouped_gemm(
    x: Tensor,
    weight: Dequantized,
    offsets_E: Tensor,
    out: Tensor,
    updates: Sequence[Update] = (),
    token_R: Tensor | None = None,
    router_R: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """See `expertune.kernels.gpu.grouped_gemm.grouped_gemm`; the weights are those of all experts."""
    rows = x if token_R is None else x[token_R]
    base = _grouped(rows, _of_experts(weight, offsets_E).transpose(1, 2), offsets_E)
    if not updates and router_R is None and not swiglu:
        out.copy_(base)
        return
    # Matrices without columns: what is left of the GEMM is its epilogue.
    own_grouped_gemm(
        rows, Dequantized(weight.weights[:, :, :0]), offsets_E, out, updates, None, router_R, None, swiglu, base
    )


def input_gradient(
    dy: Tensor, weight: Dequantized, offsets_E: Tensor, out: Tensor, token_R: Tensor | None = None, add: bool = False
) -> None:
    """See `expertune.kernels.gpu.grouped_gemm.input_gradient`; the weights are those of all experts."""
    rows = dy if token_R is None else dy[token_R]
    result = _grouped(rows, _of_experts(weight, offsets_E), offsets_E)
    if add:
        out.add_(result)
    else:
        out.copy_(result)


def _of_experts(weight: Dequantized, offsets_E: Tensor) -> Tensor:
    """[E, P * N, K]."""
    return weight.weights.view(offsets_E.shape[0], -1, weight.weights.shape[2])


def _grouped(rows: Tensor, matrices: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(rows, matrices, offs=offsets_E.to(torch.int32))
