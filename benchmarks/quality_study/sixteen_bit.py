"""LoRA over frozen weights of 16 bits, by the very code that trains over 4-bit ones: the fair reference.

The loader is handed each matrix in 16 bits before it quantizes it. Here that matrix is kept, and given out wherever
the codec would dequantize its bytes; linears stay plain ones. Adapters, kernels of the adapters, trainer and data are
those of any run. This is a way of measuring: it holds both forms in memory, and is no option of a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from expertune.checkpoint import loader
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack, cpu

# The route that dequantizes outside of its GEMMs; the other one reads the bytes inside of them.
ROUTE = "kernels.route=dequant_gemm"


@contextmanager
def frozen_weights_in_16_bits() -> Iterator[None]:
    """Models that are loaded in this block, on a CPU and from a 16-bit checkpoint, compute with its weights in it."""
    whole: dict[int, dict[int, Tensor]] = {}  # by the address of a stack's bytes, then by the matrix's index
    quantize, dequantize = Nf4Stack.write, cpu.dequantize

    def write(stack: Nf4Stack, index: int, matrix_NK: Tensor, *how: Any) -> None:
        quantize(stack, index, matrix_NK, *how)
        whole.setdefault(stack.packed.data_ptr(), {})[index] = matrix_NK.clone()

    def read(weight: Nf4Bytes, index: int, out: Tensor, rows: slice, columns: slice) -> Tensor:
        if weight.packed.data_ptr() not in whole:
            return dequantize(weight, index, out, rows, columns)
        return out.copy_(whole[weight.packed.data_ptr()][index][rows, columns])

    def keep(
        linear: nn.Linear, matrix: Tensor, _double: bool, dtype: torch.dtype, device: torch.device, *_how: Any
    ) -> nn.Linear:
        linear.weight = nn.Parameter(matrix.to(device, dtype), requires_grad=False)
        return linear

    with (
        patch.object(Nf4Stack, "write", write),
        patch.object(cpu, "dequantize", read),
        patch.object(loader, "quantized_linear", keep),
    ):
        yield
