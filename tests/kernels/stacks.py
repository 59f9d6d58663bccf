"""4-bit matrices for tests of products with them."""

import torch

from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack


def random_stack(num_matrices: int, rows: int, columns: int, kind: str, rows_differ: bool = False) -> Nf4Bytes:
    """Random matrices, the same ones each time for a size.

    Args:
        num_matrices: how many.
        rows: of each.
        columns: of each.
        kind: "double" or "plain" for NF4 with its scales quantized or in float32; "mxfp4".
        rows_differ: give the rows of NF4 matrices different sizes.
    """
    scheme = "mxfp4" if kind == "mxfp4" else "nf4"
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization=kind == "double", scheme=scheme)
    generator = torch.Generator().manual_seed(rows + columns)
    for index in range(num_matrices):
        if kind == "mxfp4":
            stack.packed[index] = torch.randint(256, stack.packed[index].shape, generator=generator, dtype=torch.uint8)
            stack.absmax[index] = torch.randint(118, 130, stack.absmax[index].shape, generator=generator).to(
                stack.absmax.dtype
            )
        else:
            sizes = torch.rand(rows, 1, generator=generator) + 0.1 if rows_differ else 1.0
            stack.write(index, torch.randn(rows, columns, generator=generator) * sizes)
    return stack.bytes
